"""Attention along a prefix tree: each token attends to its ancestors and to the earlier tokens of its own node.

Shapes: B batch (1), H heads, T tokens of the sequence, D head size. On CPUs no mask is built. A node's own tokens are one
causal block. The keys of a node with children are one full block for the queries of all its descendants, which directly follow
it. The blocks' results are merged by their log-sum-exp, as flash attention merges its tiles (Dao et al. 2022, arXiv
2205.14135, section 3.1). One custom kernel does this (kernels/cpu/tree_attention.cpp), or PyTorch's kernel block by block
(tree_torch.py) if the custom one cannot be compiled. On GPUs, rows of equal length that share nothing go through SDPA's causal
kernels, which are twice as fast there. Rows that branch or differ in length go through flex attention (flex.py), or through a
dense mask if flex attention cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.attention.flex import flex, unsupported_reason
from tunesmith.engine.attention.tree_torch import blocks_backward, blocks_forward
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import Node
from tunesmith.kernels.cpu import tree_attention as tree_kernel
from tunesmith.kernels.cpu.library import computes

NAME = "tunesmith_tree"


def _along(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T scale) v as (T, H, D), and each query's log-sum-exp (T, H); q is (H, T, D), k and v (H_kv, T, D)."""
    if has_own_kernel(query):
        return tree_kernel.forward(query, key, value, tree_kernel.table(nodes), scale)
    exact = tree_kernel.exact(query.dtype)
    tree = [Node(*each) for each in zip(*(nodes[part::3] for part in range(3)), strict=True)]
    out, weight = blocks_forward(query.to(exact), key.to(exact), value.to(exact), tree, scale)
    return out.to(query.dtype), weight


def _shapes(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors with the shapes and dtypes that `_along` returns."""
    heads, tokens, size = query.shape
    return query.new_empty((tokens, heads, size)), query.new_empty((tokens, heads), dtype=tree_kernel.exact(query.dtype))


# A torch operator, so that checkpointing can keep its results (engine/modeling/checkpointing.py) and a trace counts it.
_LIBRARY = torch.library.Library("tunesmith", "DEF")
_LIBRARY.define("tree_attention(Tensor query, Tensor key, Tensor value, int[] nodes, float scale) -> (Tensor, Tensor)")
_LIBRARY.impl("tree_attention", _along, "CPU")
torch.library.register_fake("tunesmith::tree_attention", _shapes, lib=_LIBRARY)
TREE_OPERATOR = torch.ops.tunesmith.tree_attention


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T scale) v over the blocks of a tree; q and the result are (1, H, T, D), k and v (1, H_kv, T, D).

    It computes in float32 even if the model is bf16: bf16 backward passes are several times slower on short blocks.
    """

    @staticmethod
    def forward(
        context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        by_token, weight = TREE_OPERATOR(query[0], key[0], value[0], layout.numbers, scale)
        result: torch.Tensor = by_token.transpose(0, 1).unsqueeze(0)
        context.save_for_backward(query, key, value, result, weight)
        context.layout, context.scale = layout, scale
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        *saved, weight = context.saved_tensors
        given, layout = [each[0] for each in (*saved, gradient)], context.layout
        own = has_own_kernel(gradient)
        q, k, v, result, upstream = given if own else [each.to(weight.dtype) for each in given]
        by_token = result.transpose(0, 1)
        if own:
            grads = tree_kernel.backward(q, k, v, upstream, by_token, weight, tree_kernel.table(layout.numbers), context.scale)
        else:
            grads = blocks_backward(q, k, v, upstream, by_token, weight, layout.nodes, context.scale)
        return (*(grad.transpose(0, 1).unsqueeze(0).to(gradient.dtype) for grad in grads), None, None)


def has_own_kernel(tensor: torch.Tensor) -> bool:
    """Whether the custom kernel computes this attention on a CPU. Not for FakeTensors, which the plan uses."""
    return computes(tree_kernel, tensor)


def repeat_heads(query: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Keys or values with each head repeated for the query heads that share it (grouped-query attention)."""
    groups = query.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared


def tree_attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_layout: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: (B, H, T, D) in, (B, T, H, D) out; `tree_layout` comes from the batch.

    Raises ValueError if the batch has no layout, or for a mask or dropout, which it cannot compute exactly.
    """
    if tree_layout is None or attention_mask is not None or dropout:
        raise ValueError("tree attention needs a tree layout, and supports neither a mask nor attention dropout")
    device = query.device.type
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may leave them in float32
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if device == "cpu":
        along: Any = _TreeAttention  # torch leaves `apply` untyped
        result: torch.Tensor = along.apply(query, key, value, tree_layout, scale)
    elif tree_layout.equal_rows:
        result = equal_rows_attention(query, key, value, tree_layout.equal_rows, scale)
    elif unsupported_reason(query.device, query.dtype) is None:
        result = flex(query, key, value, tree_layout.blocks(query.device), scale)
    else:
        result = masked_attention(query, key, value, tree_layout, scale)
    return result.transpose(1, 2), None


def equal_rows_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int, scale: float) -> torch.Tensor:
    """A sequence of `rows` rows of equal length without branches, computed as a batch of rows.

    Flash attention supports grouped-query attention itself; the float32 kernel does not.
    """
    # Indexing instead of `squeeze` would fill and copy a tensor of zeros for each gradient.
    query, key, value = (each.squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1) for each in (query, key, value))
    own = query.dtype in {torch.bfloat16, torch.float16} and query.shape[1] != key.shape[1]
    if not own:
        key, value = repeat_heads(query, key), repeat_heads(query, value)
    made = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=own)
    return made.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """The same with a dense mask, using whichever SDPA kernel the device has for it."""
    bias = layout.bias(query.device, query.dtype)
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


# Without a registered mask function, transformers makes no mask and passes None.
ALL_ATTENTION_FUNCTIONS.register(NAME, tree_attention)
