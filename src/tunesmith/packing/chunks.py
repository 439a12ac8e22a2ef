"""How many labelled places get their logits at once. No torch here: the planner needs it too."""

from __future__ import annotations

CHUNK_BYTES = 2**27  # of float32 logits at once
HEAD_ROWS = 2**13  # of a trained head, whose gradients are added up at once


def chunk_rows(vocabulary: int) -> int:
    """Labelled places whose logits are made at once: about 128 MiB of them in float32, 64 places at least."""
    return max(64, CHUNK_BYTES // (4 * vocabulary))
