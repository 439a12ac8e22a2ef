"""A decoder block's elementwise operators with the kernels in blocks.cpp.

Shapes: rows of H or F elements, or (B, A, L, D) for rotary embeddings. All tensors are float32, or all bfloat16, on a CPU;
rstd is float32.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.kernels.cpu import library
from tunesmith.kernels.cpu.library import call, dense_rows, own_graph

_Strides = ctypes.c_int64 * 3
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


@cache
def unsupported_reason() -> str | None:
    """Why the kernels are unsupported here, or None; the first call compiles them and tests them on small tensors."""
    return library.unsupported_reason("blocks", _gives_what_it_should)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed x / sqrt(mean(x^2) + epsilon) (weight + offset), and rstd (..., 1), the reciprocal of the square root."""
    x = x.contiguous()
    out, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _call("norm", x, weight.contiguous(), epsilon, offset, out, rstd, *_rows(x))
    return out, rstd


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, and of weight in float32 if `of_weight`. Raises MemoryError if memory is too small."""
    gradient, x, rstd = gradient.contiguous(), x.contiguous(), rstd.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32) if of_weight else None
    last = ctypes.c_void_p(None) if grad_weight is None else grad_weight
    if _call("norm_backward", gradient, x, rstd, weight.contiguous(), offset, grad_x, last, *_rows(x)) != 0:
        raise MemoryError("too little memory for a norm's gradient")
    return grad_x, grad_weight


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product silu(gate) up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _call("gated", gate, up, out, *_rows(gate))
    return out


def gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _call("gated_backward", gradient, gate, up, grad_gate, grad_up, *_rows(gate))
    return grad_gate, grad_up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    """The sum x cos + rotate_half(x) sin, or its gradient for x; x is (B, A, L, D), `cos` and `sin` (B or 1, 1, L, D)."""
    x = dense_rows(x)
    out = torch.empty_like(x)
    batch, _, length, size = x.shape
    cos, sin = (each.expand(batch, 1, length, size).contiguous() for each in (cos, sin))
    given, made = (_Strides(*each.stride()[:3]) for each in (x, out))
    _call("rotary", x, given, cos, sin, out, made, *x.shape, ctypes.c_int(backwards))
    return out


def _call(name: str, first: torch.Tensor, *others: Any) -> int:
    return call("blocks", f"{name}_{DTYPES[first.dtype]}", first, *others)


def _gives_what_it_should() -> bool:
    """Whether all kernels match torch's operators, at sizes that are not multiples of a vector."""
    draw = torch.Generator().manual_seed(0)
    x, up, gradient = (3 * torch.randn((5, 37), generator=draw) for _ in range(3))
    weight, x[0, 0] = torch.randn(37, generator=draw), -200
    heads, cos, sin = (torch.randn(shape, generator=draw) for shape in ((2, 3, 5, 22), (1, 1, 5, 22), (2, 1, 5, 22)))
    given, own = (x, up, gradient, weight, heads, cos, sin), sys.modules[__name__]
    return near(own, given, 1e-4) and near(own, [each.bfloat16() for each in given], 0.02)


def near(kernels: Any, given: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Whether a module's kernels, named as here, match torch's operators in float32.

    `given` are x, up and gradient (rows, H), a weight (H), heads (B, A, L, D), cosines and sines (B or 1, 1, L, D).
    """
    x, up, gradient, weight, heads, cos, sin = (each.float() for each in given)
    half = heads.shape[-1] // 2
    with own_graph():
        leaves = [each.clone().requires_grad_() for each in (x, up, heads, weight)]
        rstd = (leaves[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        normed, active = leaves[0] * rstd * (leaves[3] + 1), F.silu(leaves[0]) * leaves[1]
        turned = leaves[2] * cos + torch.cat([-leaves[2][..., half:], leaves[2][..., :half]], -1) * sin
        expected = [
            (normed, rstd, active, turned),
            torch.autograd.grad(normed, (leaves[0], leaves[3]), gradient, retain_graph=True),
            torch.autograd.grad(active, leaves[:2], gradient),
            torch.autograd.grad(turned, leaves[2], heads),
        ]
    x, up, gradient, weight, heads, cos, sin = given
    with torch.no_grad():
        made = kernels.norm(x, weight, 1e-5, 1.0)
        found: list[tuple[torch.Tensor, ...]] = [
            (*made, kernels.gated(x, up), kernels.rotary(heads, cos, sin, backwards=False)),
            kernels.norm_backward(gradient, x, made[1], weight, 1.0, of_weight=True),
            kernels.gated_backward(gradient, x, up),
            (kernels.rotary(heads, cos, sin, backwards=True),),
        ]
    pairs = zip(sum(found, ()), sum(map(tuple, expected), ()), strict=True)
    return all(torch.allclose(one.float(), two, rtol=tolerance, atol=tolerance) for one, two in pairs)


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // max(x.shape[-1], 1), x.shape[-1]
