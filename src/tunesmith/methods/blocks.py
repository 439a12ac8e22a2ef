"""The small operators of a decoder block as one autograd function each: fewer passes over memory, less of it kept.

Shapes: B rows, L tokens, T = B x L, H hidden size, F intermediate size, A attention heads, D head size. What each keeps for the
backward pass, in numbers a token, beside what transformers' own code keeps for the same:

    norm        H and a root (theirs: H in float32, H, a mean and a root)
    gated       gate and up, 2 F (theirs: gate, the activated gate, up: 3 F)
    rotary      nothing but the cosines and sines that all blocks share

Only for architectures whose blocks are those of Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2) with rotary
embeddings over the whole head; tests/invariant/test_blocks.py holds each against transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.methods.adapter import linears
from tunesmith.packing.tree import TREE_ARCHITECTURES

#: What Gemma adds to a norm's weight (its modelling code); the others add nothing.
_NORM_OFFSETS = {"gemma": 1.0}


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) (weight + offset) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    In float32, rounded once at the end.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        wide = x.to(_exact(x.dtype))
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        root = root.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        result: torch.Tensor = (wide * root).mul_(weight.to(wide.dtype) + offset)
        context.save_for_backward(x, root, weight)
        context.offset = offset
        return result.to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        x, root, weight = context.saved_tensors
        wide, size = x.to(root.dtype), x.shape[-1]
        into_weight = None
        if context.needs_input_grad[1]:
            products = (gradient.to(root.dtype) * wide).reshape(-1, size)
            into_weight = (root.view(1, -1) @ products).view(size).to(weight.dtype)
        if not context.needs_input_grad[0]:
            return None, into_weight, None, None
        into_x = gradient * (weight.to(root.dtype) + context.offset)  # in float32 by promotion
        along = torch.linalg.vecdot(into_x, wide).unsqueeze(-1)
        into_x.addcmul_(wide, along.mul_(root).mul_(root).div_(-size)).mul_(root)
        return into_x.to(x.dtype), into_weight, None, None


class _Gated(torch.autograd.Function):
    """activation(gate) up; the activation is made again in the backward pass (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(context: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        context.save_for_backward(gate, up)
        context.activation = activation
        return _ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        gate, up = context.saved_tensors
        active, slope = _ACTIVATIONS[context.activation]
        into_up = active(gate).mul_(gradient)
        into_active = gradient * up
        return slope(into_active, gate, grad_input=into_active), into_up, None


#: By transformers' names: the activation, and its derivative times a gradient, written to `grad_input`.
_ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward.grad_input),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward.grad_input),
    "gelu_pytorch_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin for x (B, A, L, D) (Su et al. 2021, arXiv 2104.09864); `cos` and `sin` are (B, 1, L, D)."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        result = x * cos
        result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        result[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        cos, sin = context.saved_tensors
        half = gradient.shape[-1] // 2
        result = gradient * cos
        result[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        result[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return result, None, None


def _norm(module: Any, offset: float, x: torch.Tensor) -> torch.Tensor:
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    function: Any = _Norm  # torch leaves `apply` untyped
    result: torch.Tensor = function.apply(x, module.weight, epsilon, offset)
    return result


def _mlp(module: Any, activation: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = linears([module.gate_proj, module.up_proj], x)
    function: Any = _Gated
    result: torch.Tensor = module.down_proj(function.apply(gate, up, activation))
    return result


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: Any = None,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """The block's attention; transformers' own where it generates, or makes a table of scores."""
    implementation = module.config._attn_implementation
    if past_key_values is not None or implementation == "eager":
        own: tuple[torch.Tensor, Any] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **more
        )
        return own
    shape = hidden_states.shape[:-1]
    made = linears([module.q_proj, module.k_proj, module.v_proj], hidden_states)
    query, key, value = (each.view(*shape, -1, module.head_dim) for each in made)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    cos, sin = (each.unsqueeze(1) for each in position_embeddings)
    rotary: Any = _Rotary
    mixed, weights = ALL_ATTENTION_FUNCTIONS[implementation](
        module,
        rotary.apply(query.transpose(1, 2), cos, sin),
        rotary.apply(key.transpose(1, 2), cos, sin),
        value.transpose(1, 2),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(module.config, "sliding_window", None),
        **more,
    )
    return module.o_proj(mixed.reshape(*shape, -1)), weights


def fusible(config: Any) -> bool:
    """Whether a model of this config has blocks that `fuse_blocks` computes."""
    return config.model_type in TREE_ARCHITECTURES and config.hidden_act in _ACTIVATIONS


def fuse_blocks(model: Any) -> None:
    """Let norms, MLPs and attention of `model` compute as above where they can; parameters and their names stay.

    Adapters are seen when a module computes, so they may be put in before or after.
    """
    if not fusible(model.config):
        return
    offset, activation = _NORM_OFFSETS.get(model.config.model_type, 0.0), model.config.hidden_act
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = partial(_norm, module, offset)
        elif kind.endswith("MLP"):
            module.forward = partial(_mlp, module, activation)
        elif kind.endswith("Attention"):
            module.forward = partial(_attention, module)
