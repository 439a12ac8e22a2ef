"""Attention along a prefix tree on GPUs: flex attention, which skips the blocks of a tree that see nothing of each other.

(Dong et al. 2024, arXiv 2412.05496.) Which blocks those are, the layout says (`packing.layout.block_mask`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tunesmith.engine.packing.layout import block_mask
from tunesmith.engine.packing.tree import Node
from tunesmith.errors import first_line

#: Any length, and one operator in the eyes of checkpointing, which can keep it (engine/modeling/checkpointing.py).
COMPILED: dict[str, Any] = {"dynamic": True, "options": {"wrap_inductor_compiled_regions": True}}

#: What the kernels multiply; they have no float64.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, **COMPILED)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float) -> torch.Tensor:
    """softmax(q k^T scale) v where `mask` lets it; q and the result are (1, H, T, D), k and v (1, H_kv, T, D)."""
    shared = query.shape[1] != key.shape[1]
    made: torch.Tensor = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared)
    return made


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
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
