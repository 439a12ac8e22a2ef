"""Attention along a prefix tree on GPUs with flex attention, which skips fully masked blocks.

(Dong et al. 2024, arXiv 2412.05496.) The layout decides which blocks those are (`packing.layout.block_mask`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tunesmith.engine.packing.layout import block_mask
from tunesmith.engine.packing.tree import Node
from tunesmith.errors import first_line

#: For any length, and wrapped as one operator, so that checkpointing can keep it (engine/modeling/checkpointing.py).
COMPILED: dict[str, Any] = {"dynamic": True, "options": {"wrap_inductor_compiled_regions": True}}

#: Dtypes that the kernels support; float64 is not among them.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, **COMPILED)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float) -> torch.Tensor:
    """softmax(q k^T scale) v under `mask`; q and the result are (1, H, T, D), k and v (1, H_kv, T, D)."""
    shared = query.shape[1] != key.shape[1]
    made: torch.Tensor = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared)
    return made


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flex attention cannot run here (no Triton, no compiler, a dtype without a kernel), or None; tested once."""
    if dtype not in DTYPES:
        return f"flex attention has no kernel for {dtype}"
    nodes, length = (Node(0, 24, 64), Node(24, 48, 48), Node(48, 64, 64)), 64
    query, key, value = (torch.zeros((1, heads, length, 64), dtype=dtype, device=device) for heads in (2, 1, 1))
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            flex(query.requires_grad_(), key, value, block_mask(nodes, length, device), 1.0).sum().backward()
    except (RuntimeError, ImportError, OSError) as error:  # torch's compiler raises RuntimeError
        return f"flex attention does not run here: {first_line(error)}"
    return None
