"""What memory and time are computed for: one training step on one device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.hardware import DtypeName
from tunesmith.recipe import Method

#: Bytes of one number.
BYTES = {"float32": 4, "bfloat16": 2}

Optim = Literal["adamw", "adamw_kahan", "adamw_bf16", "adamw_8bit", "adamw_torch_fused", "adamw_torch_foreach"]


@dataclass(frozen=True)
class Scenario:
    """A training step over `rows` rows of `length` tokens (or one sequence into which rows were laid out as a tree).

    `labelled` places carry loss, of all rows together. `optim` is one of the engine's, or torch's own, whose states follow the
    weights' dtype. `accumulating` tells that gradients of earlier micro-batches are there. `attention` is `sdpa` (flash, or
    flex attention along a tree, which keep the same), the engine's tree on CPU (`tree`), or `eager` with its table of scores.
    `stock` is transformers' and PEFT's way instead of the engine's: adapters that compute in float32, k-bit preparation, logits
    of all places at once. `logits_twice` tells that the backward pass makes logits again, as the loss of pairs does.
    """

    method: Method
    rows: int
    length: int
    labelled: int
    dtype: DtypeName = "bfloat16"
    r: int = 16
    gradient_checkpointing: bool = False
    optim: Optim = "adamw"
    optimizer_in_backward: bool = False
    accumulating: bool = False
    attention: Literal["sdpa", "tree", "eager"] = "sdpa"
    stock: bool = False
    logits_twice: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.rows * self.length

    @property
    def element(self) -> int:
        """Bytes of a number of the model."""
        return BYTES[self.dtype]
