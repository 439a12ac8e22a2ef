"""Norms and gated activations with Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989; BSD 2-clause), on GPUs.

One pass over memory each, like torch.compile, but without its compile time. The gradients of a gated activation overwrite its
saved tensors, so backward can run once. Rotary embeddings, and activations that Liger has no kernel for, use `dispatch.py`.
The loss stays the engine's, since Liger's has no weight per position.
"""

from __future__ import annotations

from functools import cache

import torch

from tunesmith.errors import first_line
from tunesmith.kernels.dispatch import OWN, Kernels, Pair

#: Liger's code for the "gemma" casting mode: all in float32, rounded once.
_ROUNDED_ONCE = 1


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> Pair:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    result, _, rstd, *_ = rms_norm_forward(x.contiguous(), weight, epsilon, offset, _ROUNDED_ONCE, None)
    return result, rstd.view(*x.shape[:-1], 1)


def _norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from liger_kernel.ops.rms_norm import rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    size = x.shape[-1]
    rows, how = x.contiguous().view(-1, size), (offset, _ROUNDED_ONCE, *calculate_settings(size))
    upstream, rstd = gradient.contiguous(), rstd.reshape(-1)
    grad_x, grad_weight = rms_norm_backward(upstream, rows, weight, rstd, *how, False, None, needs_dw=of_weight)
    return grad_x, grad_weight


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    from liger_kernel.ops.geglu import geglu_forward
    from liger_kernel.ops.swiglu import swiglu_forward

    forward = {"silu": swiglu_forward, "gelu_pytorch_tanh": geglu_forward}.get(activation)
    if forward is None:
        return OWN.gated(gate, up, activation)
    result: torch.Tensor = forward(gate.contiguous(), up.contiguous())[-1]
    return result


def _gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    from liger_kernel.ops.geglu import geglu_backward
    from liger_kernel.ops.swiglu import swiglu_backward

    backward = {"silu": swiglu_backward, "gelu_pytorch_tanh": geglu_backward}.get(activation)
    if backward is None:
        return OWN.gated_backward(gradient, gate, up, activation)
    grad_gate, grad_up = backward(gate.contiguous(), up.contiguous(), gradient.contiguous())
    return grad_gate, grad_up


LIGER = Kernels(_norm, _norm_backward, _gated, _gated_backward, OWN.rotary)


@cache
def liger(device: torch.device) -> Kernels:
    """Liger's kernels, tested once on a small tensor on the device. Raises RuntimeError if they are unavailable."""
    some = torch.ones((2, 3, 8), device=device)
    try:
        LIGER.norm(some, some[0, 0], 1e-5, 0.0)
        LIGER.gated(some, some, "silu")
    except Exception as error:  # Triton raises exceptions of many unrelated types
        raise RuntimeError(f"Liger's kernels do not run here: {first_line(error)}") from error
    return LIGER
