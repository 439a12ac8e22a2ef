"""float32 weights to bfloat16 without losing what was trained.

bfloat16 keeps 8 bits of mantissa, so neighbouring values are 0.4 to 0.8 % apart. Fine-tuning moves most weights by less
than half of that. Rounding to nearest discards those updates, all in the same direction, back to the base. This is
one cause of "the merged model is worse than the adapter". Stochastic rounding, up or down with probabilities given by
the distance, keeps every update in expectation. Measured by benchmarks/merge_rounding.py.
"""

from __future__ import annotations

from typing import Any

import torch

_DROPPED_BITS = 16  # float32 has 23 bits of mantissa, bfloat16 has 7 and the same exponent


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`values` (float32, any shape, finite) as bfloat16, each rounded up or down with probabilities that keep its mean.

    A value that bfloat16 represents exactly is unchanged. The same generator state gives the same bits. Raises ValueError
    for non-finite values, since an export must not hide them.
    """
    if values.dtype != torch.float32:
        raise ValueError(f"expected float32, got {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("a weight is not finite")
    return round_bits(values, generator)


def round_bits(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`round_stochastically` without its checks. Noise is drawn on the generator's device; non-finite values stay so."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << _DROPPED_BITS, bits.shape, generator=generator, dtype=torch.int32, device=generator.device)
    # Noise added below the kept bits carries into them with the right probability; the rest is truncated.
    kept = (bits + noise.to(bits.device)) & -(1 << _DROPPED_BITS)
    return kept.view(torch.float32).to(torch.bfloat16)


def split_halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` (float32) as bfloat16, rounded to nearest (ties away from zero), and the 16 bits that this cuts off.

    `join_halves` restores the same bits. `values` is overwritten. Non-finite values stay non-finite.
    """
    bits = values.view(torch.int32)
    compensation = bits.to(torch.int16)  # the lower half as a signed integer: if it is negative, rounding goes up
    bits += 1 << (_DROPPED_BITS - 1)
    bits >>= _DROPPED_BITS
    return bits.to(torch.int16).view(torch.bfloat16), compensation


def join_halves(rounded: torch.Tensor, compensation: torch.Tensor) -> torch.Tensor:
    """The float32 values that `split_halves` split."""
    bits = rounded.view(torch.int16).to(torch.int32)
    bits <<= _DROPPED_BITS
    bits += compensation
    return bits.view(torch.float32)


def round_model(model: Any, seed: int) -> Any:
    """`model` in bfloat16, its float32 parameters rounded stochastically in place; tied parameters stay tied."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = round_stochastically(parameter.data, generator)
    return model.to(torch.bfloat16)
