"""Gradient checkpointing: a block's activations are recomputed in the backward pass instead of kept (arXiv 1604.06174).

`keep_attention` keeps attention's results and log-sum-exps. On long rows only attention costs more to recompute than its bytes
are worth: its FLOPs per token grow with the row's length, its result does not. On GPUs, compiled flex attention also keeps its
inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tunesmith.engine.attention.tree import TREE_OPERATOR
from tunesmith.recipe import Checkpointing

#: Attention operators: the custom one, PyTorch's by device, flash-attn's, xformers', and the one flex attention compiles to.
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
    """Enable gradient checkpointing on a transformers model if `asked`.

    `kept` are the operators whose results `keep_attention` keeps.
    """
    if asked:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings(asked, kept))
        model.enable_input_require_grads()
