"""Chunk sizes, and when only the labelled positions are computed. No torch import: the planner needs it too."""

from __future__ import annotations

CHUNK_BYTES = 2**27  # of float32 logits per chunk
IN_PLACE = 3  # times as many if 16-bit logits are overwritten by their gradients: else each takes 4 + 2 bytes at the same time
HEAD_ROWS = 2**13  # rows of a trained head per gradient accumulation


def chunk_rows(vocabulary: int) -> int:
    """Labelled positions per chunk of logits: about 128 MiB in float32, at least 64 positions."""
    return max(64, CHUNK_BYTES // (4 * vocabulary))


def few_places(labelled: int, tokens: int) -> bool:
    """Whether so few tokens are labelled that computing only them in the last block saves more than selecting them costs.

    A skipped token saves the 4 f elements that the block keeps and their computation. Each token costs 2 h elements, a copy and
    a zero-filled gradient (h hidden size, f intermediate size).
    """
    return labelled <= 0.9 * tokens
