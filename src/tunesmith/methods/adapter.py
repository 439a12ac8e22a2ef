"""Linear layers with their adapters as one autograd function: PEFT's own modules and weights, less memory and fewer passes.

Shapes: T tokens (rows and places flattened), I in_features, O out_features, r rank. The adapter's weights stay in float32 and
multiply in the dtype of their input, so a bf16 model keeps no float32 copy of its activations, and small updates are not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import LoraLayer

from tunesmith.packing.products import add_linear, linear

Weight = Callable[[], torch.Tensor]


def base_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (O, I) weight of a linear layer in `dtype`; a 4-bit one is dequantised each time."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    made: torch.Tensor = weight.to(dtype)
    return made


class _LoraLinears(torch.autograd.Function):
    """Several linear layers of one input, each x W^T + bias + scale (d A^T) B^T; W is frozen and made when needed.

    d is x, or with dropout one tensor for each layer. Layers without dropout share one product with all their A, and their
    gradients of x are added up inside the products. Saved for the backward pass: x or each d (T, I), which the frozen product
    needs no copy of, and all d A^T (T, sum of r).
    """

    @staticmethod
    def forward(context: Any, group: _Group, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        count = len(group.weights)
        downs, ups, dropped = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        if dropped:
            low = torch.cat([linear(d, a.to(d.dtype)) for d, a in zip(dropped, downs, strict=True)], 1)
        else:
            low = linear(x, _joint(downs, x.dtype))  # (T, sum of r)
        results = []
        for weight, bias, scale, up, part in zip(group.weights, group.biases, group.scales, ups, group.parts(ups), strict=True):
            result = linear(x, weight(), bias)
            results.append(result.addmm_(low[:, part], up.to(x.dtype).T, alpha=scale))
        context.save_for_backward(*(dropped or (x,)), low, *downs, *ups)
        context.group, context.apart = group, bool(dropped)
        return results[0] if count == 1 else tuple(results)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        group: _Group = context.group
        count, saved = len(group.weights), context.saved_tensors
        sources, low, downs, ups = saved[: -2 * count - 1], saved[-2 * count - 1], saved[-2 * count : -count], saved[-count:]
        dtype = low.dtype
        into_low = torch.cat([linear(g, (b * s).to(dtype).T) for g, b, s in zip(gradients, ups, group.scales, strict=True)], 1)
        parts = group.parts(ups)
        pairs = zip(gradients, ups, group.scales, parts, strict=True)
        into_ups = [linear(low[:, part].T, g.T).T.mul(scale).to(up.dtype) for g, up, scale, part in pairs]
        if context.apart:
            into_downs = [
                linear(into_low[:, part].T, source.T).to(a.dtype) for part, source, a in zip(parts, sources, downs, strict=True)
            ]
        else:
            into_down = linear(into_low.T, sources[0].T)
            into_downs = [into_down[part].to(a.dtype) for part, a in zip(parts, downs, strict=True)]
        into_x, into_dropped = None, list[Any]()
        if context.needs_input_grad[1]:
            for gradient, weight in zip(gradients, group.weights, strict=True):
                into_x = linear(gradient, weight().T) if into_x is None else add_linear(into_x, gradient, weight().T)
            if not context.apart and into_x is not None:
                add_linear(into_x, into_low, _joint(downs, dtype).T)
        if context.apart:
            into_dropped = [linear(into_low[:, part], a.to(dtype).T) for part, a in zip(parts, downs, strict=True)]
        return None, into_x, *into_downs, *into_ups, *into_dropped


@dataclass(frozen=True)
class _Group:
    """The frozen part of linear layers that share an input: weights (O, I) when called, biases, the adapters' scales."""

    weights: list[Weight]
    biases: list[torch.Tensor | None]
    scales: list[float]

    def parts(self, ups: Sequence[torch.Tensor]) -> list[slice]:
        """Which columns of the joint low-rank product are each layer's."""
        edges = [0, *accumulate(up.shape[1] for up in ups)]
        return [slice(low, high) for low, high in pairwise(edges)]


def _joint(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A one below the other, (sum of r, I)."""
    return downs[0].to(dtype) if len(downs) == 1 else torch.cat([a.to(dtype) for a in downs])


def _plain(layer: Any) -> bool:
    """Whether a module is plain LoRA on a linear layer, switched on: what `_LoraLinears` computes."""
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), torch.nn.Linear):
        return False
    return not (layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or layer.lora_variant)


def linears(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """What each of the layers makes of the same x; as one function where all of them have plain adapters."""
    if not all(map(_plain, layers)):
        return [layer(x) for layer in layers]
    flat = x.reshape(-1, x.shape[-1])
    names = [layer.active_adapters[0] for layer in layers]
    bases = [layer.get_base_layer() for layer in layers]
    group = _Group(
        [partial(base_weight, base, x.dtype) for base in bases],
        [base.bias for base in bases],
        [layer.scaling[name] for layer, name in zip(layers, names, strict=True)],
    )
    downs = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
    ups = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
    dropouts = [layer.lora_dropout[name] for layer, name in zip(layers, names, strict=True)]
    drop = any(isinstance(dropout, torch.nn.Dropout) and dropout.training for dropout in dropouts)
    dropped = [dropout(flat) for dropout in dropouts] if drop else []
    fused: Any = _LoraLinears  # torch leaves `apply` untyped
    made = fused.apply(group, flat, *downs, *ups, *dropped)
    results = (made,) if len(layers) == 1 else made
    return [result.reshape(*x.shape[:-1], -1) for result in results]


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a PEFT linear layer; PEFT's own where it is switched off, merged, or not plain LoRA."""
    if args or kwargs or not _plain(layer):
        own: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own
    return linears([layer], x)[0]


def fuse_adapters(model: torch.nn.Module) -> None:
    """Let every LoRA layer on a linear layer of `model` compute as one function; its parameters and their names stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = partial(_forward, layer)
