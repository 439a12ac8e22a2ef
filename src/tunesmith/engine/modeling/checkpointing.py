"""Gradient checkpointing: a block's activations are not kept but computed again in the backward pass (arXiv 1604.06174).

`keep_attention` keeps what attention gave, and its log-sum-exps: all that costs more than its bytes once rows are long, as its
FLOPs grow with a row's length and its result does not. On GPUs flex attention, compiled, keeps its inputs with them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tunesmith.engine.attention.tree import TREE_OPERATOR
from tunesmith.recipe import Checkpointing

#: Attention's operators: ours, PyTorch's by device, those of flash-attn and xformers, and what flex attention is compiled to.
ATTENTION = frozenset(
    {
        TREE_OPERATOR.default.name(),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "xformers_flash::flash_fwd",
        "xformers::efficient_attention_forward_cutlass",
        torch.ops.higher_order.inductor_compiled_code.name(),
    }
)


def _policy(names: Collection[str], _context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in names else CheckpointPolicy.PREFER_RECOMPUTE


def settings(asked: Checkpointing, kept: Collection[str] = ATTENTION) -> dict[str, Any]:
    """Keyword arguments of torch's `checkpoint`: non-reentrant, which works with frozen inputs."""
    if asked == "keep_attention":
        return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, kept))}
    return {"use_reentrant": False}


def enable_checkpointing(model: Any, asked: Checkpointing, kept: Collection[str] = ATTENTION) -> None:
    """Recompute a transformers model's activations in the backward pass, where that is asked for.

    `kept` are the operators whose results stay with `keep_attention`.
    """
    if asked:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings(asked, kept))
        model.enable_input_require_grads()
