"""Cross-entropy of a head's logits in their own dtype, in Triton, without a float32 copy. Importing it requires Triton.

Shapes: N positions, V vocabulary. Computes in float32; gradients overwrite the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 8192  # logits of a row per iteration
_WARPS = 16


@triton.jit
def _cross_entropy(logits, targets, weights, losses, width, stride, with_grad: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    at = tl.arange(0, block)
    target = tl.load(targets + row)
    right = tl.load(logits + target).to(tl.float32)
    top = tl.max(tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32), 0)
    total = 0.0
    begin = 0
    while begin < width:  # Triton's interpreter does not support `range` with NumPy 2.5
        place = begin + at
        values = tl.load(logits + place, mask=place < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(values, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)
        top = higher
        begin += block
    tl.store(losses + row, tl.log(total) + top - right)
    if with_grad:
        weight = tl.load(weights + row).to(tl.float32)
        begin = 0
        while begin < width:
            place = begin + at
            values = tl.load(logits + place, mask=place < width, other=float("-inf")).to(tl.float32)
            grad_logits = tl.exp(values - top) / total
            grad_logits = tl.where(place == target, grad_logits - 1.0, grad_logits) * weight
            tl.store(logits + place, grad_logits.to(logits.dtype.element_ty), mask=place < width)
            begin += block


def from_logits(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """-log softmax of each target, (N,) float32; with `weights` (N,) the weighted sum's gradients overwrite the logits."""
    places, width = logits.shape
    losses = torch.empty(places, dtype=torch.float32, device=logits.device)
    if places:
        _cross_entropy[(places,)](
            logits,
            targets.contiguous(),
            losses if weights is None else weights.contiguous(),
            losses,
            width,
            logits.stride(0),
            with_grad=weights is not None,
            block=min(_BLOCK, triton.next_power_of_2(width)),
            num_warps=_WARPS,
        )
    return losses
