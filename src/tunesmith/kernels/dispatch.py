"""A block's elementwise operators (RMSNorm, SwiGLU, rotary embeddings) as plain functions without autograd.

`EAGER` runs them operator by operator, in place if possible. `OWN` runs each in one pass over memory with custom kernels where
they are supported (cpu/blocks.cpp: float32 and bfloat16 on a CPU; triton/blocks.py: on a GPU). `compiled` passes the same
formulas to torch.compile. `engine/modeling/blocks.py` documents shapes and formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.errors import first_line
from tunesmith.kernels import triton
from tunesmith.kernels.cpu import blocks as cpu_blocks
from tunesmith.kernels.cpu.library import computes

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Kernels:
    """One implementation of a block's elementwise functions."""

    norm: Callable[[torch.Tensor, torch.Tensor, float, float], Pair]
    """(x, weight, epsilon, offset) to the normed x and rstd, the reciprocal of the root mean square."""
    norm_backward: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor | None]
    ]
    """(gradient, x, rstd, weight, offset, of_weight) to the gradients of x and, if `of_weight`, of weight."""
    gated: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]
    """(gate, up, activation) to activation(gate) up."""
    gated_backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], Pair]
    """(gradient, gate, up, activation) to the gradients of gate and up."""
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    """(x, cos, sin, backwards) to the rotated x, or to the gradient of x if `backwards`."""


#: By transformers' names: the activation, and its backward, which writes to `grad_input`.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward.grad_input),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward.grad_input),
    "gelu_pytorch_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}

#: The backward functions without an output argument, for torch.compile.
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_pytorch_tanh": partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
}


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> Pair:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    result: torch.Tensor = (wide * rstd).mul_(weight.to(wide.dtype) + offset)
    return result.to(x.dtype), rstd


def _norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grad_weight = None
    if of_weight:
        products = (gradient.to(rstd.dtype) * x.to(rstd.dtype)).reshape(-1, x.shape[-1])
        grad_weight = (rstd.view(1, -1) @ products).view(-1)
        del products
    wide = x.to(rstd.dtype)
    grad_x = gradient * (weight.to(rstd.dtype) + offset)  # in float32 by promotion
    along = torch.linalg.vecdot(grad_x, wide).unsqueeze(-1)
    grad_x.addcmul_(wide, along.mul_(rstd).mul_(rstd).div_(-x.shape[-1])).mul_(rstd)
    return grad_x.to(x.dtype), grad_weight


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation][0](gate).mul_(up)


def _gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    active, derivative = ACTIVATIONS[activation]
    grad_up = active(gate).mul_(gradient)
    grad_active = gradient * up
    return derivative(grad_active, gate, grad_input=grad_active), grad_up


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    sign = -1 if backwards else 1
    result = x * cos
    first, second = (sin[..., half:], sin[..., :half]) if backwards else (sin[..., :half], sin[..., half:])
    result[..., :half].addcmul_(x[..., half:], first, value=-sign)
    result[..., half:].addcmul_(x[..., :half], second, value=sign)
    return result


EAGER = Kernels(_norm, _norm_backward, _gated, _gated_backward, _rotary)


def own_kernels(*tensors: torch.Tensor) -> Any:
    """The module of custom kernels that supports these tensors, or None. None for FakeTensors, which the plan uses."""
    if triton.computes(*tensors):
        from tunesmith.kernels.triton import blocks  # needs Triton

        return blocks
    return cpu_blocks if computes(cpu_blocks, *tensors) else None


def _own_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> Pair:
    kernels = own_kernels(x, weight)
    made: Pair = (_norm if kernels is None else kernels.norm)(x, weight, epsilon, offset)
    return made


def _own_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    kernels = own_kernels(gradient, x, weight)
    made: tuple[torch.Tensor, torch.Tensor | None] = (_norm_backward if kernels is None else kernels.norm_backward)(
        gradient, x, rstd, weight, offset, of_weight
    )
    return made


def _own_gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    kernels = own_kernels(gate, up) if activation == "silu" else None
    made: torch.Tensor = _gated(gate, up, activation) if kernels is None else kernels.gated(gate, up)
    return made


def _own_gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    kernels = own_kernels(gradient, gate, up) if activation == "silu" else None
    made: Pair = (
        _gated_backward(gradient, gate, up, activation) if kernels is None else kernels.gated_backward(gradient, gate, up)
    )
    return made


def _own_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    kernels = own_kernels(x, cos, sin)
    made: torch.Tensor = (_rotary if kernels is None else kernels.rotary)(x, cos, sin, backwards)
    return made


OWN = Kernels(_own_norm, _own_norm_backward, _own_gated, _own_gated_backward, _own_rotary)


def _plain_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> Pair:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * (weight.to(wide.dtype) + offset)).to(x.dtype), rstd


def _plain_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide, upstream = x.to(rstd.dtype), gradient.to(rstd.dtype)
    grad_x = upstream * (weight.to(rstd.dtype) + offset)
    along = (grad_x * wide).sum(-1, keepdim=True)
    grad_x = ((grad_x - wide * (along * rstd * rstd / x.shape[-1])) * rstd).to(x.dtype)
    return grad_x, (upstream * wide * rstd).flatten(0, -2).sum(0) if of_weight else None


def _plain_gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation][0](gate) * up


def _plain_gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    return _DERIVATIVES[activation](gradient * up, gate), ACTIVATIONS[activation][0](gate) * gradient


@cache
def compiled(device: torch.device = torch.device("cpu")) -> Kernels:
    """The functions compiled with torch.compile for dynamic shapes; tested once on a small tensor on the device.

    Raises RuntimeError if this machine cannot compile, as without a C++ compiler, or on a GPU without Triton. Rotary embeddings
    use `OWN`: compiled, they took as long as PyTorch's operators on an H100.
    """
    made = (_plain_norm, _plain_norm_backward, _plain_gated, _plain_gated_backward)
    functions: list[Any] = [torch.compile(function, dynamic=True) for function in made]  # torch.compile loses the types
    kernels = Kernels(functions[0], functions[1], functions[2], functions[3], _own_rotary)
    some = torch.ones((2, 3, 8), device=device)
    try:
        kernels.gated(some, some, "silu")
    except Exception as error:  # torch raises exceptions of many unrelated types here
        raise RuntimeError(f"torch.compile does not work here: {first_line(error)}") from error
    return kernels
