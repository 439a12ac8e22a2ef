"""What benchmarks/gpu measures: the rows of its tables, as data. No torch here.

A case is one training of a few steps in its own process. `tables` says in which tables of docs/gpu.md it appears. `seconds` is
its approximate time on an H100, so that a run with little time can skip cases that do not fit. Cases are ordered by importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Side = Literal["tunesmith", "stock", "trl_padded", "trl_packed"]

#: The structure of a 7 B model at a tiny size, for a dry run on a CPU.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_window_layers": 2,
}


@dataclass(frozen=True)
class Case:
    """A model, a method and options; `rows` rows, each with `own` tokens after `shared` tokens that all rows have in common.

    `train` has keys of the recipe's section of that name. `triton` enables tunesmith's kernels for GPUs. The loss covers all
    of a row's own tokens.
    """

    name: str
    model: str
    method: Literal["full", "lora", "qlora"]
    side: Side = "tunesmith"
    tables: tuple[int, ...] = (2, 3)
    rows: int = 1
    own: int = 2048
    shared: int = 0
    steps: int = 4
    seconds: int = 20
    train: Mapping[str, Any] = field(default_factory=dict)
    triton: bool = False

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.shared + self.own

    def tiny(self) -> Case:
        """The same case with few tokens, for a dry run."""
        return replace(self, own=max(24, self.own // 64), shared=self.shared // 16, steps=2)


CHECKPOINTED = {"gradient_checkpointing": True}
LEAN = {"gradient_checkpointing": True, "optim": "adamw_8bit", "optimizer_in_backward": True}
FAST = {"gradient_checkpointing": False}
COMPILED = {"gradient_checkpointing": False, "torch_compile": True}
KEPT = {"gradient_checkpointing": "keep_attention"}
LIGER = {"gradient_checkpointing": False, "use_liger_kernel": True}
EAGER = {"gradient_checkpointing": False, "use_liger_kernel": False}
QWEN, LLAMA = "Qwen/Qwen2-7B", "meta-llama/Llama-3.1-70B"
SHARING: dict[str, Any] = {"tables": (4,), "rows": 32, "own": 128, "shared": 512, "train": FAST}

CASES = (
    # Lowest memory of each method at 2,048 tokens.
    Case("qlora_7b", QWEN, "qlora", train=LEAN),
    Case("lora_7b", QWEN, "lora", train=LEAN),
    Case("full_7b", QWEN, "full", train=LEAN),
    # Highest speed.
    Case("lora_7b_fast", QWEN, "lora", rows=2, own=4096, train=FAST),
    Case("qlora_7b_fast", QWEN, "qlora", rows=2, own=4096, train=FAST),
    Case("full_7b_fast", QWEN, "full", rows=4, train=LEAN),
    # Rows with one long instruction.
    Case("sharing_7b", QWEN, "lora", **SHARING),
    Case("sharing_7b_trl_padded", QWEN, "lora", "trl_padded", seconds=30, **SHARING),
    # As guides do it: transformers' loss, PEFT's preparation, torch's fused AdamW.
    Case("stock_qlora_7b", QWEN, "qlora", "stock", (1, 3), train=CHECKPOINTED),
    Case("stock_lora_7b", QWEN, "lora", "stock", (1, 3), train=CHECKPOINTED),
    Case("stock_full_7b", QWEN, "full", "stock", (1, 3), train=CHECKPOINTED),
    # Larger and smaller models.
    Case("qlora_70b", LLAMA, "qlora", seconds=45, steps=3, train=LEAN),
    Case("full_7b_offloaded", QWEN, "full", train={**LEAN, "optimizer_offloading": True}),
    Case("lora_7b_compiled", QWEN, "lora", rows=2, own=4096, seconds=30, train=COMPILED),
    Case("lora_7b_liger", QWEN, "lora", rows=2, own=4096, train=LIGER),
    Case("lora_7b_triton", QWEN, "lora", rows=2, own=4096, train=EAGER, triton=True),
    Case("lora_7b_eager", QWEN, "lora", rows=2, own=4096, train=EAGER),
    Case("qlora_32b", "Qwen/Qwen2.5-32B", "qlora", seconds=30, steps=3, train=CHECKPOINTED),
    Case("lora_14b", "Qwen/Qwen2.5-14B", "lora", train=CHECKPOINTED),
    Case("full_1.5b", "Qwen/Qwen2-1.5B", "full", rows=4, train=FAST),
    Case("sharing_7b_trl_packed", QWEN, "lora", "trl_packed", seconds=30, **SHARING),
    # One long row: the effect of keeping attention.
    Case("lora_7b_long", QWEN, "lora", own=16384, seconds=30, train=CHECKPOINTED),
    Case("lora_7b_long_kept", QWEN, "lora", own=16384, seconds=30, train=KEPT),
    Case("qlora_14b", "Qwen/Qwen2.5-14B", "qlora", train=CHECKPOINTED),
)
