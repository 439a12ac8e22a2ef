"""Attention along a prefix tree with the kernel in tree_attention.cpp.

Shapes: H heads, H_kv key/value heads, T tokens, D head size. All tensors are float32, or all float64, or all bfloat16. For
bfloat16 it computes in float32 and returns float32 log-sum-exps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from tunesmith.kernels.cpu import library
from tunesmith.kernels.cpu.library import call, dense_rows, own_graph

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
#: (start, end, subtree_end) of each node in one flat array, in depth-first order.
Table = ctypes.Array[ctypes.c_int64]

DTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}


def table(nodes: Sequence[int]) -> Table:
    """The tree as the C array that the kernel reads; `nodes` has the same integers."""
    return (ctypes.c_int64 * len(nodes))(*nodes)


@cache
def unsupported_reason() -> str | None:
    """Why the kernel is unsupported here, or None; the first call compiles it and tests it on small tensors."""
    return library.unsupported_reason("tree_attention", _gives_what_it_should)


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernel computes for tensors of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Table, scale: float) -> Pair:
    """softmax(q k^T scale) v as (T, H, D), and each query's log-sum-exp (T, H).

    `query` is (H, T, D), `key` and `value` are (H_kv, T, D), with any strides. Raises MemoryError if memory is too small.
    """
    query, key, value = (dense_rows(each) for each in (query, key, value))
    heads, tokens, size = query.shape
    out, weight = query.new_empty((tokens, heads, size)), query.new_empty((tokens, heads), dtype=exact(query.dtype))
    strides = _strides(query, key, value)
    _call("forward", query, key, strides, nodes, scale, [query, key, value, out, weight])
    return out, weight


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor,
    nodes: Table,
    scale: float,
) -> Triple:
    """Gradients of query (T, H, D), key and value (T, H_kv, D); `gradient` is (H, T, D), `out` and `weight` from `forward`."""
    query, key, value, gradient = (dense_rows(each) for each in (query, key, value, gradient))
    out, weight = out.contiguous(), weight.contiguous()
    heads, tokens, size = query.shape
    grad_query = query.new_empty((tokens, heads, size))
    grad_key, grad_value = (query.new_empty((tokens, key.shape[0], size)) for _ in range(2))
    tensors = [query, key, value, gradient, out, weight, grad_query, grad_key, grad_value]
    _call("backward", query, key, _strides(query, key, value, gradient), nodes, scale, tensors)
    return grad_query, grad_key, grad_value


def _strides(*tensors: torch.Tensor) -> Table:
    found = [tensor.stride(dim) for tensor in tensors for dim in (0, 1)]
    return (ctypes.c_int64 * 8)(*found)


def _call(
    name: str, query: torch.Tensor, key: torch.Tensor, strides: Table, nodes: Table, scale: float, tensors: list[torch.Tensor]
) -> None:
    heads, tokens, size = query.shape
    sizes = (ctypes.c_int64 * 5)(heads, key.shape[0], tokens, size, len(nodes) // 3)
    function = f"tree_{name}_{DTYPES[query.dtype]}"
    if call("tree_attention", function, sizes, strides, nodes, ctypes.c_double(scale), *tensors) != 0:
        raise MemoryError("too little memory for attention")


def _gives_what_it_should() -> bool:
    """Whether a small tree's attention and gradients match the formula, in each dtype."""
    spans = [(0, 5, 40), (5, 22, 30), (22, 30, 30), (30, 40, 40)]
    mask = torch.zeros((40, 40), dtype=torch.bool)
    for start, end, subtree_end in spans:
        mask[start:subtree_end, start:end] = True
    mask.tril_()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 0.05)):
        draw = torch.Generator().manual_seed(0)
        query, key, value, gradient = (
            torch.randn((heads, 40, 24), generator=draw, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)
        )
        with own_graph():
            leaves = [each.to(exact(dtype)).requires_grad_() for each in (query, key, value)]
            keys, values = (each.repeat_interleave(2, 0) for each in leaves[1:])
            scores = (leaves[0] @ keys.transpose(1, 2) * 0.2).masked_fill(~mask, float("-inf"))
            expected = scores.softmax(-1) @ values
            grads = torch.autograd.grad(expected, leaves, gradient.to(exact(dtype)))
        nodes = table([number for span in spans for number in span])
        with torch.no_grad():
            out, weight = forward(query, key, value, nodes, 0.2)
            found = backward(query, key, value, gradient, out, weight, nodes, 0.2)
        pairs = zip((out, *found), (expected, *grads), strict=True)
        if not all(torch.allclose(a.transpose(0, 1).to(b.dtype), b, rtol=tolerance, atol=tolerance) for a, b in pairs):
            return False
    return True
