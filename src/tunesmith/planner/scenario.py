"""What memory and time are computed for: one training step on one device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.engine.modeling.chunks import few_places
from tunesmith.hardware import DtypeName
from tunesmith.models.architecture import Architecture
from tunesmith.models.families import runs_on_trees
from tunesmith.recipe import Checkpointing, Method

#: Bytes of one number.
BYTES = {"float32": 4, "bfloat16": 2}

Optim = Literal["adamw", "adamw_kahan", "adamw_bf16", "adamw_8bit", "adamw_torch_fused", "adamw_torch_foreach"]

Attention = Literal["sdpa", "flex", "tree", "eager"]


@dataclass(frozen=True)
class Scenario:
    """A training step over `rows` rows of `length` tokens (or one sequence into which rows were laid out as a tree).

    `labelled` places carry loss, of all rows together. `optim` is one of the engine's, or torch's own, whose states follow the
    weights' dtype. `accumulating` tells that gradients of earlier micro-batches are there. `attention` is `sdpa` (flash),
    `flex` along a tree (the same, but keep_attention keeps its inputs too), `tree` (ours on a CPU), or `eager` with its scores.
    `stock` is transformers' and PEFT's way instead of the engine's: adapters that compute in float32, k-bit preparation, logits
    of all places at once. `logits_twice` tells that the backward pass makes logits again, as the loss of pairs does.
    `modules_to_save` names what is trained whole beside an adapter; with `optimizer_offloading` states are not on the device.
    """

    method: Method
    rows: int
    length: int
    labelled: int
    dtype: DtypeName = "bfloat16"
    r: int = 16
    gradient_checkpointing: Checkpointing = False
    optim: Optim = "adamw"
    optimizer_in_backward: bool = False
    accumulating: bool = False
    attention: Attention = "sdpa"
    stock: bool = False
    logits_twice: bool = False
    modules_to_save: tuple[str, ...] = ()
    optimizer_offloading: bool = False

    def trains(self, module: str) -> bool:
        """Whether modules of this name, such as `embed_tokens` or `norm`, are trained themselves."""
        ends = [name.rpartition(".")[2] for name in self.modules_to_save]
        return self.method == "full" or any(module.endswith(end) or end.endswith(module) for end in ends)

    def trains_head(self, a: Architecture) -> bool:
        """Whether the head is, under its own name or that of the embedding that it is tied to."""
        return self.trains("lm_head") or (a.tie_word_embeddings and self.trains("embed_tokens"))

    def whole_parameters(self, a: Architecture) -> int:
        """Parameters that are trained whole beside an adapter."""
        if self.method == "full":
            return 0
        parts = {"embed_tokens": a.embedding_parameters, "lm_head": a.head_parameters, "norm": a.norm_parameters}
        return sum(count for name, count in parts.items() if self.trains(name))

    def fused(self, a: Architecture) -> bool:
        """Whether blocks compute as engine/modeling/blocks.py has them."""
        return not self.stock and runs_on_trees(a.model_type)

    def ends_early(self, a: Architecture) -> bool:
        """Whether the last block ends at the labelled places (engine/modeling/places.py)."""
        return self.fused(a) and few_places(self.labelled, self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.rows * self.length

    @property
    def element(self) -> int:
        """Bytes of a number of the model."""
        return BYTES[self.dtype]
