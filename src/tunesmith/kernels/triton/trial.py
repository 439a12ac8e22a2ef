"""Tests on a device whether the kernels match PyTorch's operators, at sizes that are not multiples of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map

from tunesmith.kernels.cpu import blocks as cpu_blocks
from tunesmith.kernels.triton import adamw, blocks, cross_entropy


def wrong(device: torch.device) -> str | None:
    """Why the kernels must not be used on the device, or None."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, 1037), (5, 1037), (5, 1037), (1037,), (2, 5, 3, 22), (1, 1, 3, 22), (1, 1, 3, 22))
    given = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        cast = [each.to(dtype) for each in given]
        if not (cpu_blocks.near(blocks, cast, tolerance) and _loss_matches(cast[0], tolerance)):
            return "the kernels' results do not match the reference formulas"
    if not all(_updates(device, dtype) for dtype in (torch.float32, torch.bfloat16)):
        return "the optimizer kernel's results do not match the reference formula"
    return None


def _updates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a first update with 8-bit states moves as AdamW does: against the gradient's sign, by the learning rate.

    And whether each byte encodes the value nearest to its mean, or square.
    """
    weight, gradient = (torch.linspace(*ends, 1037, device=device).to(dtype) for ends in ((-3, 3), (2, -5)))
    found, scales = weight.clone(), torch.zeros((2, 5), device=device)
    mean, square = (
        adamw.Moment(torch.zeros_like(found, dtype=torch.uint8), each, create_dynamic_map(signed=signed).to(device))
        for each, signed in zip(scales, (True, False), strict=True)
    )
    step = adamw.Step(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, number=1, seed=0)
    adamw.update(found, gradient, (mean, square), step)
    weight, gradient = weight.float(), gradient.float()
    expected = weight * 0.95 - 0.1 * gradient / (gradient.abs() + 1e-8)
    one_step = 2**-7 if dtype == torch.bfloat16 else 1e-5  # stochastic rounding goes up or down
    moved = torch.allclose(found.float(), expected, rtol=one_step, atol=1e-5)
    return moved and _nearest(mean, 0.1 * gradient) and _nearest(square, 0.01 * gradient**2)


def _nearest(moment: adamw.Moment, values: torch.Tensor) -> bool:
    """Whether each byte of a state encodes the value nearest to the one it should store."""
    if moment.scales is None or moment.code is None:
        raise AssertionError("only bytes have a nearest value")
    block = torch.arange(len(values), device=values.device) // adamw.STATE_BLOCK
    share, code = values / moment.scales[block], moment.code
    apart = (code[moment.values.int()] - share).abs() - (code - share[:, None]).abs().amin(1)
    return bool((apart < 1e-5).all())


def _loss_matches(logits: torch.Tensor, tolerance: float) -> bool:
    """Whether cross-entropy of (5, V) logits and their gradients match PyTorch's."""
    places, weights = torch.arange(5, device=logits.device), torch.linspace(0.5, 2, 5, device=logits.device)
    targets = 200 * places
    losses, into = F.cross_entropy(logits.float(), targets, reduction="none"), logits.float().softmax(1)
    into[places, targets] -= 1
    grad_logits = logits.clone()
    found = [
        cross_entropy.from_logits(logits, targets, None),
        cross_entropy.from_logits(grad_logits, targets, weights),
        grad_logits.float(),
    ]
    expected = [losses, losses, into * weights[:, None]]
    return all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in zip(found, expected, strict=True))
