"""A weight's gradient, g^T x, by the kernel of products.cpp.

Shapes: T rows, I in_features, O out_features. All tensors are float32 on a CPU.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from tunesmith.native.library import NoKernelError, library


@cache
def reason_against() -> str | None:
    """Why the kernel cannot be had here, or None; it is compiled, and tried on small tensors, the first time."""
    try:
        library("products")
    except NoKernelError as error:
        return str(error)
    draw = torch.Generator().manual_seed(0)
    gradient, x = (torch.randn((390, size), generator=draw) for size in (100, 70))
    with torch.no_grad():
        alike = torch.allclose(across_rows(gradient, x), gradient.T @ x, rtol=1e-4, atol=1e-3)
    return None if alike else "the compiled kernel's results are not those of the formula"


def across_rows(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product g^T x (O, I) for g (T, O) and x (T, I). Raises MemoryError where there is too little."""
    gradient, x = (each if each.stride(1) == 1 else each.contiguous() for each in (gradient, x))
    if len(x) == 0:
        return x.new_zeros((gradient.shape[1], x.shape[1]))
    out = x.new_empty((gradient.shape[1], x.shape[1]))
    left, right = ((ctypes.c_void_p(each.data_ptr()), ctypes.c_int64(each.stride(0))) for each in (gradient, x))
    sizes = (ctypes.c_int64(size) for size in (len(x), *out.shape))
    done = library("products").across_rows(
        *left, *right, ctypes.c_void_p(out.data_ptr()), *sizes, ctypes.c_int(torch.get_num_threads())
    )
    if done != 0:
        raise MemoryError("too little memory for a weight's gradient")
    return out
