"""Linear layers with their adapters as one autograd function: PEFT's own modules and weights, less memory and fewer passes.

Shapes: T tokens (rows and positions flattened), I in_features, O out_features, r rank. The adapter's weights stay in float32
and are cast to their input's dtype for the matmul. So a bf16 model keeps no float32 copy of its activations, and small updates
are not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import LoraLayer

from tunesmith.engine.modeling.gemm import across_rows, add_linear, linear
from tunesmith.kernels.cpu import adapters
from tunesmith.kernels.cpu.adapters import adapted
from tunesmith.kernels.cpu.library import computes

Weight = Callable[[], torch.Tensor]


def base_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (O, I) weight of a linear layer in `dtype`; a 4-bit weight is dequantised on each call."""
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    made: torch.Tensor = weight.to(dtype)
    return made


class _LoraLinears(torch.autograd.Function):
    """Several linear layers of one input, each x W^T + bias + scale (d A^T) B^T; W is frozen and materialised when needed.

    d is x, or with dropout one tensor per layer. Without dropout, a custom kernel accumulates each layer's two GEMMs in
    registers (kernels/cpu/adapters.cpp). Without that kernel, the layers share one GEMM with all their A, and their gradients
    of x accumulate inside the GEMMs. Saved for the backward pass: x or each d (T, I), of which the frozen GEMM needs no
    copy, and each d A^T (T, r).
    """

    @staticmethod
    def forward(context: Any, group: _Group, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        count = len(group.weights)
        downs, ups, dropped = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        layers = list(zip(group.weights, group.biases, group.scales, ups, strict=True))
        lows: Sequence[torch.Tensor]
        if not dropped and has_own_kernel(x, *downs, *ups):
            pairs = zip(layers, downs, strict=True)
            made = [adapted(x, weight().T, a.T, b.T, q_scale=scale) for (weight, _, scale, b), a in pairs]
            lows, results = zip(*made, strict=True)
            for result, bias in zip(results, group.biases, strict=True):
                if bias is not None:
                    result.add_(bias)
        else:
            lows = _lows(x, downs, dropped)
            results = tuple(
                linear(x, weight(), bias).addmm_(low, b.to(x.dtype).T, alpha=scale)
                for low, (weight, bias, scale, b) in zip(lows, layers, strict=True)
            )
        context.save_for_backward(*(dropped or (x,)), *lows, *downs, *ups)
        context.group, context.apart = group, bool(dropped)
        return results[0] if count == 1 else results

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        group: _Group = context.group
        count, saved = len(group.weights), context.saved_tensors
        lows, downs, ups = (saved[-part * count :][:count] for part in (3, 2, 1))
        sources: Sequence[torch.Tensor] = saved[: -3 * count]
        sides = zip(lows, gradients, group.scales, ups, strict=True)
        grad_ups = [_into_up(gradient, low, scale, b.dtype) for low, gradient, scale, b in sides]
        grad_x, joint = _into_inputs(group, gradients, downs, ups, for_x=context.needs_input_grad[1], apart=context.apart)
        ranks = [len(a) for a in downs]
        if context.apart:
            pairs = list(zip(joint.split(ranks, 1), downs, strict=True))
            grad_dropped = [linear(low, a.to(low.dtype).T) for low, a in pairs]
            grad_downs = [across_rows(low, d, a.dtype) for (low, a), d in zip(pairs, sources, strict=True)]
            return None, grad_x, *grad_downs, *grad_ups, *grad_dropped
        return None, grad_x, *across_rows(joint, sources[0], downs[0].dtype).split(ranks), *grad_ups


@dataclass(frozen=True)
class _Group:
    """The frozen part of linear layers that share an input: functions that return weights (O, I), biases, adapter scales."""

    weights: list[Weight]
    biases: list[torch.Tensor | None]
    scales: list[float]


def _lows(x: torch.Tensor, downs: Sequence[torch.Tensor], dropped: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each d A^T (T, r)."""
    if dropped:
        return [linear(d, a.to(d.dtype)) for d, a in zip(dropped, downs, strict=True)]
    return list(linear(x, _joint(downs, x.dtype)).split([len(a) for a in downs], 1))


def _scaled(joint: torch.Tensor, ranks: Sequence[int], scales: Sequence[float]) -> torch.Tensor:
    """`joint` (T, sum of r) with each layer's columns multiplied by its scale, in place."""
    if len(set(scales)) == 1:
        return joint if scales[0] == 1 else joint.mul_(scales[0])
    for part, scale in zip(joint.split(list(ranks), 1), scales, strict=True):
        part.mul_(scale)
    return joint


def _into_up(gradient: torch.Tensor, low: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The gradient (O, r) of a layer's B."""
    # The CPU kernels take the thin side first.
    made = across_rows(gradient, low, dtype) if gradient.is_cuda else across_rows(low, gradient, dtype).T
    return made if scale == 1 else made.mul_(scale)


def _into_inputs(
    group: _Group,
    gradients: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    *,
    for_x: bool,
    apart: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradient of x (T, I) if `for_x`, without the adapters' part if `apart`; and of all d A^T (T, sum of r)."""
    layers = list(zip(gradients, group.weights, group.scales, downs, ups, strict=True))
    grad_x: torch.Tensor | None = None
    if for_x and not apart and has_own_kernel(*gradients, *downs, *ups):
        grad_lows = []
        for gradient, weight, scale, a, b in layers:
            grad_low, grad_x = adapted(gradient, weight(), b, a, p_scale=scale, total=grad_x)
            grad_lows.append(grad_low)
        return grad_x, torch.cat(grad_lows, 1)
    lows = [linear(gradient, b.to(gradient.dtype).T) for gradient, _, _, _, b in layers]
    joint = _scaled(lows[0] if len(lows) == 1 else torch.cat(lows, 1), [len(a) for a in downs], group.scales)
    for gradient, weight, _, _, _ in layers if for_x else []:
        grad_x = linear(gradient, weight().T) if grad_x is None else add_linear(grad_x, gradient, weight().T)
    if grad_x is not None and not apart:
        add_linear(grad_x, joint, _joint(downs, grad_x.dtype).T)
    return grad_x, joint


def has_own_kernel(*tensors: torch.Tensor) -> bool:
    """Whether a custom kernel supports these tensors. Not for FakeTensors, which the plan uses."""
    return not torch.is_autocast_enabled("cpu") and computes(adapters, *tensors)


def _joint(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A concatenated, (sum of r, I)."""
    return (downs[0] if len(downs) == 1 else torch.cat(list(downs))).to(dtype)


def _plain(layer: Any) -> bool:
    """Whether a module is plain, enabled LoRA on a linear layer, which `_LoraLinears` can compute."""
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), torch.nn.Linear):
        return False
    return not (layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or layer.lora_variant)


def linears(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """The output of each layer for the same x; one autograd function if all of them have plain adapters."""
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
    """The forward of a PEFT linear layer; PEFT's own if it is disabled, merged, or not plain LoRA."""
    if args or kwargs or not _plain(layer):
        own: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own
    return linears([layer], x)[0]


def fuse_adapters(model: torch.nn.Module) -> None:
    """Run each LoRA layer on a linear layer of `model` as one autograd function; parameters and their names stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = partial(_forward, layer)
