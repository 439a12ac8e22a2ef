"""Attention along a prefix tree on CPUs with PyTorch's flash kernel, block by block, if the custom kernel cannot be compiled.

Shapes: H heads, H_kv key/value heads, T tokens, D head size. A node's own tokens are one causal block. The keys of a node with
children are one full block for the queries of all its descendants, which directly follow it. The backward pass gives each
block the merged result and log-sum-exp, which makes its gradients exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tunesmith.engine.packing.tree import Node

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def blocks_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Sequence[Node], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T scale) v as (T, H, D), and each query's log-sum-exp (T, H); q is (H, T, D), k and v (H_kv, T, D).

    Heads are viewed as (H_kv, H / H_kv), so all query heads that share keys and values read them in place.
    """
    queries, *others = (_by_shared(each, key.shape[0]) for each in (query, key, value))
    keys, values = (each.expand(-1, queries.shape[1], -1, -1) for each in others)
    # (T, H, D) in memory, as the output projection reads it. The running log-sum-exps of the queries have the same order.
    by_token = (queries.shape[2], *queries.shape[:2])
    merged = torch.empty((*by_token, queries.shape[3]), dtype=query.dtype).permute(1, 2, 0, 3)
    weight = torch.empty(by_token, dtype=query.dtype).permute(1, 2, 0)
    for node in nodes:
        own = slice(node.start, node.end)
        block = (queries[:, :, own], keys[:, :, own], values[:, :, own])
        merged[:, :, own], weight[:, :, own] = _forward(*block, 0.0, True, scale=scale)
    for below, own in _shared(nodes):
        block = (queries[:, :, below], keys[:, :, own], values[:, :, own])
        part, part_weight = _forward(*block, 0.0, False, scale=scale)
        total = torch.logaddexp(weight[:, :, below], part_weight)
        merged[:, :, below] *= (weight[:, :, below] - total).exp_().unsqueeze(-1)
        merged[:, :, below] += part * (part_weight - total).exp_().unsqueeze(-1)
        weight[:, :, below] = total
    return merged.flatten(0, 1).transpose(0, 1), weight.flatten(0, 1).T


def blocks_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor,
    nodes: Sequence[Node],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query (T, H, D), key and value (T, H_kv, D); `gradient` is (H, T, D), `out` and `weight` from forward."""
    shared = key.shape[0]
    by_head = (gradient.contiguous(), query, out.transpose(0, 1), key, value)
    upstream, queries, merged, *others = (_by_shared(each, shared) for each in by_head)
    keys, values = (each.expand(-1, queries.shape[1], -1, -1) for each in others)
    weights = weight.T.unflatten(0, (shared, -1))
    grads = [torch.empty(each.shape, dtype=each.dtype) for each in (queries, *others)]

    def block(above: slice, below: slice, *, causal: bool) -> list[torch.Tensor]:
        """Gradients of the queries at `below`, and of the keys and values at `above`."""
        made = _backward(
            upstream[:, :, below],
            queries[:, :, below],
            keys[:, :, above],
            values[:, :, above],
            merged[:, :, below],
            weights[:, :, below],
            0.0,
            causal,
            scale=scale,
        )
        return [made[0], *(each.sum(1, keepdim=True) for each in made[1:])]

    for node in nodes:
        own = slice(node.start, node.end)
        for total, part in zip(grads, block(own, own, causal=True), strict=True):
            total[:, :, own] = part
    for below, own in _shared(nodes):
        for total, part, where in zip(grads, block(own, below, causal=False), (below, own, own), strict=True):
            total[:, :, where] += part
    grad_query, grad_key, grad_value = (grad.flatten(0, 1).transpose(0, 1) for grad in grads)
    return grad_query, grad_key, grad_value


def _shared(nodes: Sequence[Node]) -> Iterator[tuple[slice, slice]]:
    """For each node with descendants, starting at the root: the range of its descendants, and its own."""
    for node in nodes:
        if node.subtree_end > node.end:
            yield slice(node.end, node.subtree_end), slice(node.start, node.end)


def _by_shared(tensor: torch.Tensor, shared: int) -> torch.Tensor:
    """(H or H_kv, T, D) as (H_kv, H / H_kv or 1, T, D); `shared` is H_kv."""
    apart: torch.Tensor = tensor.unflatten(0, (shared, -1))
    return apart
