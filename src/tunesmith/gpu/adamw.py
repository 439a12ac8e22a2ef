"""One update of AdamW with small states as one kernel, in Triton. Importing it takes Triton.

Read and written for each parameter are gradient, weight and states, and nothing else: no float32 copies. Formulas and
formats are those of `methods/optimizers.py`; what is rounded at random draws from a counter (Salmon et al. 2011, Philox).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: Numbers that share a scale, as in `methods/sizes.py`, and how many such blocks a program computes.
STATE_BLOCK = 256
_BLOCKS = 4

# How a weight is rounded; what kernels read of a module has to be a `constexpr`.
EXACT, AT_RANDOM, COMPENSATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Moment:
    """A state, flat: (T,) bf16, or uint8 with what these stand for.

    `scales` are float32, one for each 256; `code` (256) the values of a byte, ascending, and `middles` (255) half-way between
    each two of them.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    code: torch.Tensor | None = None
    middles: torch.Tensor | None = None


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
    """bfloat16, up or down with odds that keep the mean; what is not finite stays so."""
    bits = values.to(tl.int32, bitcast=True)
    kept = (bits + (noise & 0xFFFF).to(tl.int32)) & -65536
    return kept.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _encode(values, kept, scales, middles, at, block, inside, has_block, noise, bits_each: tl.constexpr):
    if bits_each == 8:
        most = tl.max(tl.where(inside, tl.abs(values), 0.0), 1, keep_dims=True)
        share = values / tl.where(most > 0, most, 1.0)
        place = tl.zeros_like(at).to(tl.int32)
        for power in tl.static_range(8):  # how many of the 255 middles between two values lie below
            place += tl.where(share > tl.load(middles + place + ((128 >> power) - 1)), 128 >> power, 0)
        tl.store(kept + at, place.to(tl.uint8), mask=inside)
        tl.store(scales + block, most, mask=has_block)
    else:
        tl.store(kept + at, _at_random(values, noise), mask=inside)


@triton.jit(do_not_specialize=["seed", "first"])
def _update(
    weight,
    gradient,
    cut_off,
    mean,
    mean_scales,
    mean_code,
    mean_middles,
    square,
    square_scales,
    square_code,
    square_middles,
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
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        slope *= tl.minimum(most / (tl.load(norm).to(tl.float32) + 1e-6), 1.0)
    old_mean = _decode(mean, mean_scales, mean_code, at, block, inside, has_block, bits_each)
    old_square = _decode(square, square_scales, square_code, at, block, inside, has_block, bits_each)
    new_mean = old_mean + (slope - old_mean) * mean_share
    new_square = old_square * square_beta + slope * slope * square_share
    stored = tl.load(weight + at, mask=inside, other=0.0)
    if rounding == COMPENSATED:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
        low = tl.load(cut_off + at, mask=inside, other=0)
        value = (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    value = value * keep - step_size * new_mean / (tl.sqrt(new_square) / root_correction + eps)
    one, two, three, _ = tl.randint4x(seed, at + first)
    if rounding == COMPENSATED:
        bits = value.to(tl.int32, bitcast=True)
        tl.store(cut_off + at, bits.to(tl.int16), mask=inside)
        high = ((bits + 32768) >> 16).to(tl.int16)
        tl.store(weight + at, high.to(tl.bfloat16, bitcast=True), mask=inside)
    elif rounding == AT_RANDOM:
        tl.store(weight + at, _at_random(value, one), mask=inside)
    else:
        tl.store(weight + at, value, mask=inside)
    _encode(new_mean, mean, mean_scales, mean_middles, at, block, inside, has_block, two, bits_each)
    _encode(new_square, square, square_scales, square_middles, at, block, inside, has_block, three, bits_each)


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[Moment, Moment],
    step: Step,
    cut_off: torch.Tensor | None = None,
    clip: tuple[torch.Tensor, float] | None = None,
    first: int = 0,
) -> None:
    """One update in place of a flat weight (T,): float32, or bf16 rounded at random, or with `cut_off` (T,) int16 compensated.

    `moments` are the means of gradients and of their squares. `clip` is the gradient's norm (a number on the device) and the
    most that it may be, as torch's `clip_grad_norm_` has it.
    Of a weight that comes in slices, `first` is the place of this one's first number.
    """
    (mean, square), count, (beta1, beta2) = moments, weight.numel(), step.betas
    rounding = EXACT if weight.dtype == torch.float32 else AT_RANDOM if cut_off is None else COMPENSATED
    blocks = triton.cdiv(count, STATE_BLOCK)
    _update[(triton.cdiv(blocks, _BLOCKS),)](
        weight,
        gradient,
        cut_off,
        mean.values,
        mean.scales,
        mean.code,
        mean.middles,
        square.values,
        square.scales,
        square.code,
        square.middles,
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
        bits_each=16 if mean.scales is None else 8,
        rounding=rounding.value,
        many=_BLOCKS,
        size=STATE_BLOCK,
    )
