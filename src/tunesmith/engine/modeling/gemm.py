"""Products of activations with weights: by oneDNN or a custom kernel where they are float32 on a CPU, else by torch's choice.

Torch takes MKL for float32; where both were measured in turn, on an AMD processor, oneDNN took less time for each shape of a
block (benchmarks/results/products.json). Shapes: T rows, I in_features, O out_features.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.kernels.cpu import products
from tunesmith.kernels.cpu.library import plain

#: Layers compute by oneDNN from this many rows on, and where their weight is no larger than this. Fewer rows, as when a model
#: generates, were not measured; a head's logits were faster call by call, but slower in the profiles of whole steps.
_ROWS = 256
_NUMBERS = 2**23

#: Rows of a product from which on both of its sides are copied into panels; below, one of them is read in place.
_OWN_ROWS = 64


@cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes the product; not where the user has turned it off, or autocast chooses the dtype.

    Nor of tensors that stand for others, as the plan's do for a GPU's.
    """
    fitting = plain(x) and x.dtype == weight.dtype == torch.float32
    return bool(
        fitting and x.numel() > 0 and _has_onednn() and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product x W^T + bias for x (..., I) and W (O, I); without gradients, as autograd functions want it."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def add_linear(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add the product x W^T to `total`, in place; as above."""
    if not _by_onednn(x, weight):
        return total.addmm_(x, weight.T)
    return total.add_(_onednn(x, weight, None))


def across_rows(gradient: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The product g^T x (O, I) for g (T, O) and x (T, I), a weight's gradient; as above, in `dtype` where one is given.

    oneDNN would copy g transposed first, on one thread; the custom kernel reads it in place. A GPU rounds its float32 sums to
    `dtype` once.
    """
    if dtype is not None and dtype != x.dtype:
        if x.is_cuda and dtype == torch.float32:
            return torch.mm(gradient.T, x, out_dtype=dtype)
        return across_rows(gradient, x).to(dtype)
    if has_own_kernel(gradient, x) and gradient.stride(1) == 1:
        return (products.across_rows if gradient.shape[1] >= _OWN_ROWS else products.thin_across_rows)(gradient, x)
    return linear(gradient.T, x.T)


def has_own_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `across_rows` of these has a custom kernel."""
    return _by_onednn(x, weight) and products.unsupported_reason() is None


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What torch.compile calls for linear layers on a CPU; here with a weight that is not packed for it.

    A weight whose rows or columns do not follow one another would go through oneDNN's reference code, a thousand times slower.
    """
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


class _Linear(torch.autograd.Function):
    """x W^T + bias for x (T, I); what is kept is what torch keeps, x and W.

    With gradient checkpointing the last product of a block is made again too: torch's own ends the recomputation before it.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        context.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        x, weight = context.saved_tensors
        for_x, for_weight, for_bias = context.needs_input_grad
        grad_x = linear(gradient, weight.T) if for_x else None
        grad_weight = across_rows(gradient, x) if for_weight else None
        return grad_x, grad_weight, gradient.sum(0) if for_bias else None


def _forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    if x.numel() < _ROWS * x.shape[-1] or weight.numel() > _NUMBERS or not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    function: Any = _Linear  # torch leaves `apply` untyped
    result: torch.Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return result.view(*x.shape[:-1], -1)


def use_products(model: torch.nn.Module) -> None:
    """Let the plain linear layers of a model compute as above; its parameters and their names stay."""
    linears: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    for layer in linears:
        layer.forward = partial(_forward, layer)
