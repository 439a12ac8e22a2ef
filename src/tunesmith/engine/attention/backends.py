"""Selects the attention kernel for rows that are not packed into a tree: the one asked for, or the next that works here.

An unavailable kernel falls back in an order that never changes the result, only time and memory: flash attention, then
PyTorch's SDPA, then plain matmuls ("eager"). Each fallback is reported to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.attention.tree import NAME as TREE_ATTENTION
from tunesmith.engine.attention.tree import repeat_heads
from tunesmith.errors import first_line
from tunesmith.models.head import causal_of

#: The fallback of each kernel.
_NEXT = {"flash_attention_3": "flash_attention_2", "flash_attention_2": "sdpa", "xformers": "sdpa", "sdpa": "eager"}


def use_tree_attention(model: Any, *, on: bool) -> None:
    """Switch a model between tree attention, which needs batches with a layout, and SDPA."""
    causal_of(model).set_attn_implementation(TREE_ATTENTION if on else "sdpa")


def use_attention(model: Any, asked: str, on_fallback: Callable[[str], None]) -> str:
    """Switch the model to `asked` (transformers' name, or `xformers`) or the next kernel that works; returns the one in use.

    `on_fallback` gets a sentence for each kernel that was skipped, with the reason. Raises ValueError if none works.
    """
    causal, name = causal_of(model), asked
    while True:
        try:
            if name == "xformers":
                _register_xformers(causal)
            causal.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            following = _NEXT.get(name)
            if following is None:
                raise
            on_fallback(f"attention {name} is unavailable, falling back to {following}: {first_line(error)}")
            name = following
        else:
            return name


def _register_xformers(causal: Any) -> None:
    """Register xformers' kernel with transformers. Raises ImportError if it is missing, ValueError if it cannot run."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if causal.device.type != "cuda":
        raise ValueError("xformers has kernels for CUDA GPUs only")

    def attention(
        _module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, H, T, D) in, (B, T, H, D) out. Rows are padded on the right, so causal attention never sees padding."""
        if attention_mask is not None:
            raise ValueError("padding is on the right and needs no mask")
        q, k, v = (each.transpose(1, 2) for each in (query, repeat_heads(query, key), repeat_heads(query, value)))
        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask(), p=dropout, scale=scaling), None

    # Without a registered mask function, transformers makes no mask and passes None.
    ALL_ATTENTION_FUNCTIONS.register("xformers", attention)
