"""A reward model's rewards for conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rewards_of(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each row of token ids, one row at a time without padding; in eval mode and without gradients."""
    import torch

    model.eval()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, 0]) for ids in rows]
