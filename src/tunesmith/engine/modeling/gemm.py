"""GEMMs of activations with weights: oneDNN for float32 on a CPU, else torch's choice.

Torch uses MKL for float32. In an interleaved measurement on an AMD processor, oneDNN was faster for each GEMM shape of a
block (benchmarks/results/gemm.json). Shapes: T rows, I in_features, O out_features.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.kernels.cpu.library import plain

#: Layers use oneDNN from this many rows on, and only if their weight has at most this many elements. Fewer rows, as in
#: generation, were not measured. A head's logits were faster call by call, but slower in the profiles of whole steps.
_ROWS = 256
_NUMBERS = 2**23


@cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes the GEMM. Not if the user has disabled it, or if autocast chooses the dtype.

    Nor for FakeTensors, which the plan uses for a GPU's tensors.
    """
    fitting = plain(x) and x.dtype == weight.dtype == torch.float32
    return bool(
        fitting and x.numel() > 0 and _has_onednn() and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The GEMM x W^T + bias for x (..., I) and W (O, I); without autograd, for use inside autograd functions."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def add_linear(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add x W^T to `total` in place; as above."""
    if not by_onednn(x, weight):
        return total.addmm_(x, weight.T)
    return total.add_(_onednn(x, weight, None))


def across_rows(gradient: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The GEMM g^T x (O, I) for g (T, O) and x (T, I), a weight's gradient; as above, in `dtype` if given.

    A GPU rounds its float32 accumulator to `dtype` once.
    """
    if dtype is not None and dtype != x.dtype:
        if x.is_cuda and dtype == torch.float32:
            return torch.mm(gradient.T, x, out_dtype=dtype)
        return across_rows(gradient, x).to(dtype)
    return linear(gradient.T, x.T)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operator that torch.compile calls for linear layers on a CPU; here with an unpacked weight.

    A weight that is contiguous neither by rows nor by columns would use oneDNN's reference code, a thousand times slower.
    """
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


class _Linear(torch.autograd.Function):
    """x W^T + bias for x (T, I); like torch it saves x and W.

    With gradient checkpointing it also recomputes the last GEMM of a block; torch's own stops the recomputation before it.
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
    if x.numel() < _ROWS * x.shape[-1] or weight.numel() > _NUMBERS or not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    function: Any = _Linear  # torch leaves `apply` untyped
    result: torch.Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return result.view(*x.shape[:-1], -1)


def use_onednn(model: torch.nn.Module) -> None:
    """Make a model's plain linear layers use these GEMMs; its parameters and their names stay."""
    linears: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    for layer in linears:
        layer.forward = partial(_forward, layer)
