"""Attention along a prefix tree on GPUs: flex attention, which skips the blocks of a tree that see nothing of each other.

(Dong et al. 2024, arXiv 2412.05496.) Descendants of a node follow it directly, so a query q sees a key k where
k <= q < last[k], `last` being the end of the subtree of the key's node: one number a token says all of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tunesmith.errors import first_line
from tunesmith.packing.tree import Node

#: Queries, and keys, of a block that is computed as a whole or not at all.
BLOCK = 128

#: Any length, and one operator in the eyes of checkpointing, which can keep it (methods/checkpointing.py).
COMPILED: dict[str, Any] = {"dynamic": True, "options": {"wrap_inductor_compiled_regions": True}}

#: What the kernels multiply; they have no float64.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def subtree_ends(nodes: Sequence[Node], length: int) -> torch.Tensor:
    """(T,) int32: for each token the end of its node's subtree, the first query after it that does not see it."""
    last = torch.zeros(length, dtype=torch.int32)
    for node in nodes:
        last[node.start : node.end] = node.subtree_end
    return last


def block_mask(nodes: Sequence[Node], length: int, device: torch.device) -> BlockMask:
    """Which blocks of queries see which blocks of keys: all of it, some of it by `last`, or nothing."""
    last = subtree_ends(nodes, length)
    count = -(-length // BLOCK)
    by_block = torch.nn.functional.pad(last, (0, count * BLOCK - length)).view(count, BLOCK)  # behind the end nobody sees a key
    first_query = torch.arange(0, count * BLOCK, BLOCK).unsqueeze(1)
    below = first_query > first_query.T
    whole = below & (first_query + BLOCK - 1 < by_block.amin(1))
    partly = (below & (first_query < by_block.amax(1)) & ~whole) | torch.eye(count, dtype=torch.bool)
    ends = last.to(device)

    def sees(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query < ends[key])

    made: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(partly, device), *_ordered(whole, device), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )
    return made


def _ordered(which: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries the number of key blocks in `which`, and their numbers before all others'."""
    order = torch.argsort(which.int(), dim=-1, descending=True, stable=True).int()
    return which.sum(-1).int()[None, None].to(device), order[None, None].to(device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, **COMPILED)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float) -> torch.Tensor:
    """softmax(q k^T scale) v where `mask` lets it; q and the result are (1, H, T, D), k and v (1, H_kv, T, D)."""
    shared = query.shape[1] != key.shape[1]
    made: torch.Tensor = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared)
    return made


@cache
def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flex attention cannot run here (no Triton, no compiler, a dtype without a kernel), or None; tried once."""
    if dtype not in DTYPES:
        return f"flex attention has no kernel for {dtype}"
    nodes, length = (Node(0, 24, 64), Node(24, 48, 48), Node(48, 64, 64)), 64
    query, key, value = (torch.zeros((1, heads, length, 64), dtype=dtype, device=device) for heads in (2, 1, 1))
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            flex(query.requires_grad_(), key, value, block_mask(nodes, length, device), 1.0).sum().backward()
    except (RuntimeError, ImportError, OSError) as error:  # what torch's compiler raises is a RuntimeError
        return f"flex attention does not run here: {first_line(error)}"
    return None
