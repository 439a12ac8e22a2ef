"""The small operators of a decoder block as one autograd function each: fewer passes over memory, fewer saved activations.

Shapes: B rows, L tokens, T = B x L, H hidden size, F intermediate size, A attention heads, D head size. What each saves for the
backward pass, in elements per token, compared with transformers' own code:

    norm        H and one rstd (transformers: H in float32, H, a mean and an rstd)
    gated       gate and up, 2 F (transformers: gate, the activated gate, up: 3 F)
    rotary      only the cosines and sines that all blocks share

After its attention, the last block computes only the labelled positions: the others contribute only keys and values.

Only for architectures with Llama's blocks (Touvron et al. 2023, arXiv 2302.13971, section 2.2) and rotary embeddings over the
whole head; tests/invariant/test_blocks.py compares each with transformers' modules.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.modeling.adapter import linears
from tunesmith.engine.modeling.gemm import use_onednn
from tunesmith.engine.modeling.places import at_places, take_places
from tunesmith.kernels.dispatch import ACTIVATIONS, OWN, Kernels
from tunesmith.models.families import FAMILIES, runs_on_trees


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) (weight + offset) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    In float32, rounded once at the end.
    """

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, kernels: Kernels
    ) -> torch.Tensor:
        result, rstd = kernels.norm(x, weight, epsilon, offset)
        context.save_for_backward(x, rstd, weight)
        context.offset, context.kernels = offset, kernels
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        x, rstd, weight = context.saved_tensors
        of_weight = context.needs_input_grad[1]
        grad_x, grad_weight = context.kernels.norm_backward(gradient, x, rstd, weight, context.offset, of_weight)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class _Gated(torch.autograd.Function):
    """activation(gate) up; the backward pass recomputes the activation (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(context: Any, gate: torch.Tensor, up: torch.Tensor, activation: str, kernels: Kernels) -> torch.Tensor:
        context.save_for_backward(gate, up)
        context.activation, context.kernels = activation, kernels
        return kernels.gated(gate, up, activation)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return *context.kernels.gated_backward(gradient, *context.saved_tensors, context.activation), None, None


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin for x (B, A, L, D) (Su et al. 2021, arXiv 2104.09864); `cos` and `sin` are (B, 1, L, D)."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        context.save_for_backward(cos, sin)
        context.kernels = kernels
        return kernels.rotary(x, cos, sin, False)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return context.kernels.rotary(gradient, *context.saved_tensors, True), None, None, None


def _norm(module: Any, offset: float, kernels: Kernels, x: torch.Tensor) -> torch.Tensor:
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    function: Any = _Norm  # torch leaves `apply` untyped
    result: torch.Tensor = function.apply(x, module.weight, epsilon, offset, kernels)
    return result


def _mlp(module: Any, activation: str, kernels: Kernels, x: torch.Tensor) -> torch.Tensor:
    gate, up = linears([module.gate_proj, module.up_proj], x)
    function: Any = _Gated
    result: torch.Tensor = module.down_proj(function.apply(gate, up, activation, kernels))
    return result


def _attention(
    module: Any,
    kernels: Kernels,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: Any = None,
    places: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """The block's attention, (1, N, H) at `places` if given; transformers' own forward for generation and eager attention."""
    more.pop("last_places", None)  # all blocks get it; the last one passes it on as `places`
    implementation = module.config._attn_implementation
    cached = any(isinstance(value, Cache) for value in more.values())  # as past_key_values, in later versions as cache
    if cached or implementation == "eager":
        own: tuple[torch.Tensor, Any] = type(module).forward(module, hidden_states, position_embeddings, attention_mask, **more)
        return own if places is None else (at_places(own[0], places), own[1])
    shape = hidden_states.shape[:-1]
    made = linears([module.q_proj, module.k_proj, module.v_proj], hidden_states)
    query, key, value = (each.view(*shape, -1, module.head_dim) for each in made)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    cos, sin = (each.unsqueeze(1) for each in position_embeddings)
    rotary: Any = _Rotary
    mixed, weights = ALL_ATTENTION_FUNCTIONS[implementation](
        module,
        rotary.apply(query.transpose(1, 2), cos, sin, kernels),
        rotary.apply(key.transpose(1, 2), cos, sin, kernels),
        value.transpose(1, 2),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(module.config, "sliding_window", None),
        **more,
    )
    mixed = mixed.reshape(*shape, -1)
    return module.o_proj(mixed if places is None else at_places(mixed, places)), weights


def _last_block(
    module: Any, hidden_states: torch.Tensor, *, last_places: torch.Tensor | None = None, **more: Any
) -> torch.Tensor:
    """The block's output, (1, N, H) at `last_places` of the flattened (B x L) tokens if they are given."""
    if last_places is None:
        whole: torch.Tensor = type(module).forward(module, hidden_states, **more)
        return whole
    mixed, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), places=last_places, **more)
    middle = at_places(hidden_states, last_places) + mixed
    result: torch.Tensor = middle + module.mlp(module.post_attention_layernorm(middle))
    return result


def fusible(config: Any) -> bool:
    """Whether a model of this config has blocks that `fuse_blocks` supports."""
    return runs_on_trees(config.model_type) and config.hidden_act in ACTIVATIONS


def fuse_blocks(model: Any, kernels: Kernels = OWN) -> None:
    """Replace the forwards of norms, MLPs and attention of `model` if its blocks are supported; parameters and names stay.

    Its linear layers use `engine/modeling/gemm.py` for any architecture.

    Adapters are looked up in each forward, so they may be added before or after. A second call replaces the `kernels` of the
    first.
    """
    use_onednn(model)
    if not fusible(model.config):
        return
    offset, activation = FAMILIES[model.config.model_type].norm_offset, model.config.hidden_act
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = partial(_norm, module, offset, kernels)
        elif kind.endswith("MLP"):
            module.forward = partial(_mlp, module, activation, kernels)
        elif kind.endswith("Attention"):
            module.forward = partial(_attention, module, kernels)
    take_places(model.get_decoder(), _last_block)
