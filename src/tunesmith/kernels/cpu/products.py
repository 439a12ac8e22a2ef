"""A weight's gradient, g^T x, with the kernel in products.cpp.

Shapes: T rows, I in_features, O out_features. All tensors are float32 on a CPU.
"""

from __future__ import annotations

from functools import cache

import torch

from tunesmith.kernels.cpu import library
from tunesmith.kernels.cpu.library import call, dense_rows


@cache
def unsupported_reason() -> str | None:
    """Why the kernel is unsupported here, or None; the first call compiles it and tests it on small tensors."""
    return library.unsupported_reason("products", _gives_what_it_should)


def across_rows(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The GEMM g^T x (O, I) for g (T, O) and x (T, I). Raises MemoryError if memory is too small."""
    gradient, x = dense_rows(gradient), dense_rows(x)
    if len(x) == 0:
        return x.new_zeros((gradient.shape[1], x.shape[1]))
    out = x.new_empty((gradient.shape[1], x.shape[1]))
    if call("products", "across_rows", gradient, gradient.stride(0), x, x.stride(0), out, len(x), *out.shape) != 0:
        raise MemoryError("too little memory for a weight's gradient")
    return out


def thin_across_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same, (R, N) for left (T, R) and right (T, N), for small R: `right` is read once. Raises MemoryError as above."""
    left, right = dense_rows(left), dense_rows(right)
    if len(right) == 0:
        return right.new_zeros((left.shape[1], right.shape[1]))
    out = right.new_empty((left.shape[1], right.shape[1]))
    sizes = (len(right), *out.shape)
    if call("products", "thin_across_rows", left, left.stride(0), right, right.stride(0), out, *sizes) != 0:
        raise MemoryError("too little memory for a weight's gradient")
    return out


def _gives_what_it_should() -> bool:
    """Whether a small GEMM matches torch's operator."""
    draw = torch.Generator().manual_seed(0)
    gradient, x = (torch.randn((390, size), generator=draw) for size in (100, 70))
    with torch.no_grad():
        made = (across_rows(gradient, x), thin_across_rows(gradient, x))
        return all(torch.allclose(each, gradient.T @ x, rtol=1e-4, atol=1e-3) for each in made)
