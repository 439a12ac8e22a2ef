"""One AdamW update with 16- or 8-bit states as one kernel, in Triton. Importing it requires Triton.

Per parameter it reads and writes only gradient, weight and states: no float32 copies. `engine/optim/adamw.py` defines formulas
and formats; stochastic rounding uses a counter-based generator (Salmon et al. 2011, Philox).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

#: Values that share a scale, as in `engine/optim/sizes.py`, and the number of such blocks per program.
STATE_BLOCK = 256
_BLOCKS = 4

# How a weight is rounded; module globals that kernels read must be `constexpr`.
EXACT, AT_RANDOM, COMPENSATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Moment:
    """A flat state: (T,) bf16, or uint8 with a float32 scale per 256 values and the 256 values of bitsandbytes' dynamic map."""

    values: torch.Tensor
    scales: torch.Tensor | None = None
    code: torch.Tensor | None = None


@dataclass(frozen=True)
class Step:
    """The settings of an update; `number` counts from 1."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    number: int
    seed: int


@triton.jit
def _decode(values, scales, code, at, block, inside, has_block, bits_each: tl.constexpr):
    kept = tl.load(values + at, mask=inside, other=0)
    if bits_each == 8:
        return tl.load(code + kept.to(tl.int32)) * tl.load(scales + block, mask=has_block, other=0.0)
    return kept.to(tl.float32)


@triton.jit
def _at_random(values, noise):
    """bfloat16, rounded up or down with probabilities that keep the mean; non-finite values stay non-finite."""
    bits = values.to(tl.int32, bitcast=True)
    kept = (bits + (noise & 0xFFFF).to(tl.int32)) & -65536
    return kept.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _nearest(share, edges, signed: tl.constexpr):
    """The byte whose value is nearest to each share in [-1, 1], or [0, 1]: finds its decade, then its part of the decade.

    A decade's byte values are evenly spaced, and their number is a power of two (`_edges`). A table lookup would need eight
    dependent, scattered loads.
    """
    size = tl.abs(share)
    decade, tens = tl.zeros_like(share).to(tl.int32), tl.zeros_like(share)
    for number in tl.static_range(7):
        above = size > tl.load(edges + number)
        decade = tl.where(above, number, decade)
        tens = tl.where(above, tl.load(edges + 8 + number), tens)
    more: tl.constexpr = 0 if signed else 1
    count = tl.full(share.shape, 1, tl.int32) << (decade + more)
    part = ((size * tens - 0.1) * (count.to(tl.float32) / 0.9)).to(tl.int32)
    rank = count - more + tl.minimum(part, count - 1)  # a decade begins at a share above its 0.1
    rank = tl.where(size > tl.load(edges), rank, 0)
    rank = tl.where(size > tl.load(edges + 7), 128 if signed else 255, rank)
    if signed:  # one is the last value; minus one has no byte
        rank = 127 + tl.where(share < 0, -tl.minimum(rank, 127), rank)
    return rank


@triton.jit
def _encode(values, kept, scales, edges, at, block, inside, has_block, noise, signed: tl.constexpr, bits_each: tl.constexpr):
    if bits_each == 8:
        most = tl.max(tl.where(inside, tl.abs(values), 0.0), 1, keep_dims=True)
        share = values / tl.where(most > 0, most, 1.0)
        tl.store(kept + at, _nearest(share, edges, signed).to(tl.uint8), mask=inside)
        tl.store(scales + block, most, mask=has_block)
    else:
        tl.store(kept + at, _at_random(values, noise), mask=inside)


@triton.jit(do_not_specialize=["seed", "first"])
def _update(
    weight,
    gradient,
    compensation,
    mean,
    mean_scales,
    mean_code,
    mean_edges,
    square,
    square_scales,
    square_code,
    square_edges,
    norm,
    most,
    count,
    blocks,
    first,
    keep,
    step_size,
    mean_share,
    square_beta,
    square_share,
    root_correction,
    eps,
    seed,
    bits_each: tl.constexpr,
    rounding: tl.constexpr,
    many: tl.constexpr,
    size: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)[:, None]
    at = block * size + tl.arange(0, size)[None, :]
    inside, has_block = at < count, block < blocks
    grad = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        grad *= tl.minimum(most / (tl.load(norm).to(tl.float32) + 1e-6), 1.0)
    old_mean = _decode(mean, mean_scales, mean_code, at, block, inside, has_block, bits_each)
    old_square = _decode(square, square_scales, square_code, at, block, inside, has_block, bits_each)
    new_mean = old_mean + (grad - old_mean) * mean_share
    new_square = old_square * square_beta + grad * grad * square_share
    stored = tl.load(weight + at, mask=inside, other=0.0)
    if rounding == COMPENSATED:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
        low = tl.load(compensation + at, mask=inside, other=0)
        value = (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    value = value * keep - step_size * new_mean / (tl.sqrt(new_square) / root_correction + eps)
    one, two, three, _ = tl.randint4x(seed, at + first)
    if rounding == COMPENSATED:
        bits = value.to(tl.int32, bitcast=True)
        tl.store(compensation + at, bits.to(tl.int16), mask=inside)
        high = ((bits + 32768) >> 16).to(tl.int16)
        tl.store(weight + at, high.to(tl.bfloat16, bitcast=True), mask=inside)
    elif rounding == AT_RANDOM:
        tl.store(weight + at, _at_random(value, one), mask=inside)
    else:
        tl.store(weight + at, value, mask=inside)
    _encode(new_mean, mean, mean_scales, mean_edges, at, block, inside, has_block, two, True, bits_each)
    _encode(new_square, square, square_scales, square_edges, at, block, inside, has_block, three, False, bits_each)


@cache
def _edges(device: torch.device, *, signed: bool) -> torch.Tensor:
    """(15,) float32 of bitsandbytes' dynamic map: the start of each of seven decades, and of one; each's scale to 0.1 to 1.

    From 10^(d-6) 0.1 to 10^(d-6) there are 2^d values (of each sign), or 2^(d+1) unsigned, each in the middle of its part; in
    addition zero and one. A byte's interval begins half-way to its neighbour.
    """
    halves = [0.45 / 2 ** (decade + (not signed)) for decade in range(7)]  # of a part
    tops = [0.0, *(10.0 ** (decade - 6) * (1 - half) for decade, half in enumerate(halves))]
    starts = [*(10.0 ** (decade - 6) * (0.1 + half) for decade, half in enumerate(halves)), 1.0]
    begin = [(top + start) / 2 for top, start in zip(tops, starts, strict=True)]
    return torch.tensor([*begin, *(10.0 ** (6 - decade) for decade in range(7))], device=device)


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[Moment, Moment],
    step: Step,
    compensation: torch.Tensor | None = None,
    clip: tuple[torch.Tensor, float] | None = None,
    first: int = 0,
) -> None:
    """One in-place update of a flat weight (T,): float32, bf16 rounded stochastically, or bf16 with `compensation` (T,) int16.

    `moments` are the means of gradients and of their squares. `clip` is the gradient's norm (a scalar on the device) and the
    maximum norm, as in torch's `clip_grad_norm_`. If a weight is updated in slices, `first` is the index of this slice's first
    element.
    """
    (mean, square), count, (beta1, beta2) = moments, weight.numel(), step.betas
    eight = mean.scales is not None
    edges = [_edges(weight.device, signed=signed) if eight else None for signed in (True, False)]
    rounding = EXACT if weight.dtype == torch.float32 else AT_RANDOM if compensation is None else COMPENSATED
    blocks = -(-count // STATE_BLOCK)
    _update[(-(-blocks // _BLOCKS),)](
        weight,
        gradient,
        compensation,
        mean.values,
        mean.scales,
        mean.code,
        edges[0],
        square.values,
        square.scales,
        square.code,
        edges[1],
        *(clip or (None, 1.0)),
        count,
        blocks,
        first,
        1 - step.lr * step.weight_decay,
        step.lr / (1 - beta1**step.number),
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step.number) ** 0.5,
        step.eps,
        step.seed,
        bits_each=8 if eight else 16,
        rounding=rounding.value,
        many=_BLOCKS,
        size=STATE_BLOCK,
    )
