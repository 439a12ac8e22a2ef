"""Sizes that are fixed by the design of methods and optimizers. No torch import: the planner needs them too."""

from __future__ import annotations

#: Bytes of a weight in NF4 with double quantisation: half a byte, one scale byte per 64 weights, four bytes per 256 scales
#: (Dettmers et al. 2023, arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

#: Parameters per optimizer update slice: the float32 copies of gradient, states and weight never exceed 4 x 32 MiB.
OPTIMIZER_SLICE = 2**23

#: Values of an 8-bit state that share a float32 scale (Dettmers et al. 2022, arXiv 2110.02861).
STATE_BLOCK = 256

#: Bits of each of AdamW's two states, by the recipe's `train.optim`.
STATE_BITS = {"adamw": 32, "adamw_kahan": 16, "adamw_8bit": 8}

#: The optimizers that keep a Kahan compensation buffer: two more bytes for what rounding a bf16 weight cuts off.
COMPENSATED = frozenset({"adamw_kahan"})


def state_bytes(optim: str) -> float:
    """Bytes of both states per parameter; `master_bytes` has what a bf16 weight needs in addition."""
    bits = STATE_BITS[optim]
    return 2 * (bits / 8 + (4 / STATE_BLOCK if bits == 8 else 0))


def master_bytes(optim: str) -> int:
    """Bytes that keep a bf16 weight's update exact: a float32 master or a compensation buffer; 0 with stochastic rounding."""
    return 4 if optim == "adamw" else 2 if optim in COMPENSATED else 0
