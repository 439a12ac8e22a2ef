"""Shifted sparse attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, section 3.2): for training on long rows.

Each token attends within its group of G tokens. In the second half of the heads, groups begin half a group later. The paper
rolls the sequence, so both ends share a group and the first tokens attend to the last. Here the two half groups at the ends
stay separate, and no token attends to a later one. Row lengths need not be multiples of G: padding comes after them, where
causal attention does not look. Evaluation uses full attention.

Shapes: B batch, H heads, L tokens of a row, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.attention.tree import repeat_heads
from tunesmith.engine.packing.batch import Batch, PaddedCollator, Rows
from tunesmith.models.head import causal_of

NAME = "tunesmith_shifted"


class ShiftedCollator(PaddedCollator):
    """Padded rows with the group size for attention and no mask: no token attends to padding on the right."""

    def __init__(self, pad_id: int | None, group: int) -> None:
        super().__init__(pad_id)
        self.group = group

    def __call__(self, rows: Rows) -> Batch:
        batch = super().__call__(rows)
        batch.pop("attention_mask", None)
        return batch | {"shifted_group": self.group}


def _grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, scale: float) -> torch.Tensor:
    """Causal attention within each stretch of `group` tokens; all (B, H, L, D)."""
    batch, _, length, _ = query.shape
    short = -length % group

    def cut(each: torch.Tensor) -> torch.Tensor:
        """(B x groups, H, G, D)."""
        padded: torch.Tensor = F.pad(each, (0, 0, 0, short)).unflatten(2, (-1, group))
        return padded.transpose(1, 2).flatten(0, 1)

    mixed = F.scaled_dot_product_attention(cut(query), cut(key), cut(value), is_causal=True, scale=scale)
    joined: torch.Tensor = mixed.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return joined[:, :, :length]


def _shifted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, scale: float) -> torch.Tensor:
    """The same with groups that begin half a group later; the first half group is a group of its own."""
    half = group // 2
    head = F.scaled_dot_product_attention(query[:, :, :half], key[:, :, :half], value[:, :, :half], is_causal=True, scale=scale)
    if query.shape[2] <= half:
        return head
    return torch.cat([head, _grouped(query[:, :, half:], key[:, :, half:], value[:, :, half:], group, scale)], 2)


def shifted_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shifted_group: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: (B, H, L, D) in, (B, L, H, D) out; full and causal outside training.

    Raises ValueError for inputs that it cannot compute exactly.
    """
    if shifted_group is None or attention_mask is not None or dropout:
        raise ValueError("shifted sparse attention needs a group size, and supports neither a mask nor attention dropout")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may leave them in float32
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not module.training:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return mixed.transpose(1, 2), None
    half = query.shape[1] // 2
    plain = _grouped(query[:, :half], key[:, :half], value[:, :half], shifted_group, scale)
    late = _shifted(query[:, half:], key[:, half:], value[:, half:], shifted_group, scale)
    mixed = torch.cat([plain, late], 1)
    return mixed.transpose(1, 2), None


def use_shifted_attention(model: Any) -> None:
    """Switch a model to shifted attention; its batches must come from a `ShiftedCollator`."""
    causal_of(model).set_attn_implementation(NAME)


# Without a registered mask function, transformers makes no mask and passes None.
ALL_ATTENTION_FUNCTIONS.register(NAME, shifted_attention)
