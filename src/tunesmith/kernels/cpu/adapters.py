"""A linear layer with its adapter, and the gradient of its input, with the kernel in adapters.cpp.

Shapes: T tokens, K features of each, N columns, R rank. All tensors are float32 on a CPU.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from tunesmith.kernels.cpu import library
from tunesmith.kernels.cpu.library import call, dense_rows

_Strides = ctypes.c_int64 * 6
DTYPES = frozenset({torch.float32})


@cache
def unsupported_reason() -> str | None:
    """Why the kernel is unsupported here, or None; the first call compiles it and tests it on small tensors."""
    return library.unsupported_reason("adapters", _gives_what_it_should)


def adapted(
    x: torch.Tensor,
    m: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    *,
    p_scale: float = 1.0,
    q_scale: float = 1.0,
    total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-rank GEMM `low` = p_scale x P (T, R), and x M + q_scale low Q (T, N), added to `total` if given.

    For x (T, K), M (K, N), P (K, R) and Q (R, N), all but x with any strides. Raises MemoryError if memory is too small.
    """
    x = dense_rows(x)
    low = x.new_empty((len(x), p.shape[1]))
    out = x.new_empty((len(x), m.shape[1])) if total is None else total
    if not out.is_contiguous():
        raise ValueError("`total` must be contiguous")
    strides = _Strides(*m.stride(), *p.stride(), *q.stride())
    sizes = (*x.shape, *q.shape[::-1])
    scales, adds = (float(p_scale), float(q_scale)), ctypes.c_int(total is not None)
    if call("adapters", "adapted", x, x.stride(0), m, p, q, strides, *scales, low, out, adds, *sizes) != 0:
        raise MemoryError("too little memory for a linear layer's product")
    return low, out


def _gives_what_it_should() -> bool:
    """Whether a small layer's results match torch's operators, with matrices read by rows and by columns."""
    draw = torch.Generator().manual_seed(0)
    x, weight, down, up = (torch.randn(shape, generator=draw) for shape in ((20, 70), (90, 70), (5, 70), (90, 5)))
    with torch.no_grad():
        low, out = adapted(x, weight.T, down.T, up.T, q_scale=2.0)
        grad_low, grad_x = adapted(out, weight, up, down, p_scale=2.0, total=x.clone())
        expected = x @ weight.T + 2 * (x @ down.T) @ up.T
        grads = 2 * expected @ up
        pairs = ((low, x @ down.T), (out, expected), (grad_low, grads), (grad_x, x + expected @ weight + grads @ down))
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-2) for one, other in pairs)
