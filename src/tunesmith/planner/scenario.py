"""The training step on one device that memory and time are computed for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.engine.modeling.chunks import few_places
from tunesmith.hardware import DtypeName
from tunesmith.models.architecture import Architecture
from tunesmith.models.families import runs_on_trees
from tunesmith.recipe import Checkpointing, Method

#: Bytes per element.
BYTES = {"float32": 4, "bfloat16": 2}

Optim = Literal["adamw", "adamw_kahan", "adamw_8bit", "adamw_torch_fused", "adamw_torch_foreach"]

Attention = Literal["sdpa", "flex", "tree", "eager"]


@dataclass(frozen=True)
class Scenario:
    """A training step over `rows` rows of `length` tokens (or over one sequence into which rows are packed as a tree).

    `labelled` is the number of positions with loss in all rows. `optim` is one of the engine's optimizers or torch's own,
    whose states have the weights' dtype. `accumulating`: gradients of earlier micro-batches are held. `attention` is `sdpa`
    (flash), `flex` on a tree (the same memory, but keep_attention also stores its inputs), `tree` (the engine's CPU kernel), or
    `eager` with its score matrix. `stock` is the path of transformers and PEFT instead of the engine's: float32 adapters, k-bit
    preparation, logits of all positions at once. `logits_twice`: the backward pass recomputes logits, as the loss of pairs
    does. `modules_to_save` names modules that are fully trained in addition to an adapter. With `optimizer_offloading` the
    optimizer states are not on the device.
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
        """Whether modules of this name, such as `embed_tokens` or `norm`, are trained directly, not through an adapter."""
        ends = [name.rpartition(".")[2] for name in self.modules_to_save]
        return self.method == "full" or any(module.endswith(end) or end.endswith(module) for end in ends)

    def trains_head(self, a: Architecture) -> bool:
        """Whether the head is trained directly, by its own name or through a tied embedding."""
        return self.trains("lm_head") or (a.tie_word_embeddings and self.trains("embed_tokens"))

    def whole_parameters(self, a: Architecture) -> int:
        """Number of fully trained parameters in addition to an adapter."""
        if self.method == "full":
            return 0
        parts = {"embed_tokens": a.embedding_parameters, "lm_head": a.head_parameters, "norm": a.norm_parameters}
        return sum(count for name, count in parts.items() if self.trains(name))

    def fused(self, a: Architecture) -> bool:
        """Whether blocks run as in engine/modeling/blocks.py."""
        return not self.stock and runs_on_trees(a.model_type)

    def ends_early(self, a: Architecture) -> bool:
        """Whether the last block ends at the labelled positions (engine/modeling/places.py)."""
        return self.fused(a) and few_places(self.labelled, self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.rows * self.length

    @property
    def element(self) -> int:
        """Bytes per element of the model's dtype."""
        return BYTES[self.dtype]
