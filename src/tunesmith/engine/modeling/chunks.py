"""How much is computed at once, and for which places. No torch here: the planner needs it too."""

from __future__ import annotations

CHUNK_BYTES = 2**27  # of float32 logits at once
IN_PLACE = 3  # times as many where 16-bit logits become their own derivatives: else there are 4 and 2 bytes of each at once
HEAD_ROWS = 2**13  # of a trained head, whose gradients are added up at once


def chunk_rows(vocabulary: int) -> int:
    """Labelled places whose logits are made at once: about 128 MiB of them in float32, 64 places at least."""
    return max(64, CHUNK_BYTES // (4 * vocabulary))


def few_places(labelled: int, tokens: int) -> bool:
    """Whether so few tokens are labelled that ending the last block at them saves more than picking them out takes.

    A token left out saves 4 f numbers that the block keeps and what they are computed with; each token costs 2 h, a copy and a
    gradient's zeros (h hidden, f intermediate size).
    """
    return labelled <= 0.9 * tokens
