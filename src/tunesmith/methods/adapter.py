"""A linear layer with its adapter as one autograd function: PEFT's own modules and weights, less memory and fewer passes.

Shapes: T tokens (rows and places flattened), I in_features, O out_features, r rank. The adapter's weights stay in float32 and
multiply in the dtype of their input, so a bf16 model keeps no float32 copy of its activations, and small updates are not lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import LoraLayer

Weight = Callable[[], torch.Tensor]


def base_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (O, I) weight of a linear layer in `dtype`; a 4-bit one is dequantised each time."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    made: torch.Tensor = weight.to(dtype)
    return made


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale (d A^T) B^T, where d is x or x after dropout; W is frozen and made when needed.

    Saved for the backward pass: x (T, I), which the frozen product needs no copy of, and d A^T (T, r).
    """

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: Weight,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        source = x if dropped is None else dropped
        low = source @ a.to(x.dtype).T  # (T, r)
        result = F.linear(x, weight(), bias)
        result.addmm_(low, b.to(x.dtype).T, alpha=scale)
        context.save_for_backward(source, low, a, b)
        context.weight, context.scale, context.apart = weight, scale, dropped is not None
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        source, low, a, b = context.saved_tensors
        into_low = (gradient @ b.to(gradient.dtype)).mul_(context.scale)  # (T, r)
        gradient_a = (into_low.T @ source).to(a.dtype)
        gradient_b = (gradient.T @ low).mul_(context.scale).to(b.dtype)
        gradient_x = gradient_dropped = None
        if context.needs_input_grad[0]:
            gradient_x = gradient @ context.weight()
            if not context.apart:
                gradient_x.addmm_(into_low, a.to(gradient.dtype))
        if context.apart and context.needs_input_grad[1]:
            gradient_dropped = into_low @ a.to(gradient.dtype)
        return gradient_x, gradient_dropped, None, None, gradient_a, gradient_b, None


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a PEFT linear layer; PEFT's own where it is switched off, merged, or not plain LoRA."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or layer.lora_variant or args or kwargs:
        own: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own
    name = active[0]
    flat = x.reshape(-1, x.shape[-1])
    dropout = layer.lora_dropout[name]
    dropped = dropout(flat) if isinstance(dropout, torch.nn.Dropout) and layer.training else None
    base = layer.get_base_layer()
    fused: Any = _LoraLinear  # torch leaves `apply` untyped
    result: torch.Tensor = fused.apply(
        flat,
        dropped,
        partial(base_weight, base, x.dtype),
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )
    return result.reshape(*x.shape[:-1], -1)


def fuse_adapters(model: torch.nn.Module) -> None:
    """Let every LoRA layer on a linear layer of `model` compute as one function; its parameters and their names stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = partial(_forward, layer)
