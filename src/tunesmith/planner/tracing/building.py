"""Models from the real modules of transformers and PEFT, without a checkpoint: on meta for tracing, on a device for timing.

Weights, if any, are random: neither memory nor time depends on them.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.attention.tree import NAME as TREE_ATTENTION
from tunesmith.engine.modeling.adapter import fuse_adapters
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.checkpointing import ATTENTION, enable_checkpointing
from tunesmith.engine.optim.adamw import AdamW, InBackward, store_of
from tunesmith.methods import AdapterSettings, adapter_config
from tunesmith.planner.scenario import Scenario

_SPREAD = 0.02  # standard deviation of random weights: transformers' usual one

PLAIN_ATTENTION, LIKE_FLEX = "tunesmith_plain_causal", "tunesmith_like_flex"


def _plain_causal(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA without a mask, as for rows of one length. In a trace, transformers' own path would build a dense mask."""
    made = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return made.transpose(1, 2), None


_LIBRARY = torch.library.Library("tunesmith", "FRAGMENT")
_LIBRARY.define("held(Tensor x) -> Tensor")
_LIBRARY.impl("held", torch.clone, "CPU")
torch.library.register_fake("tunesmith::held", torch.empty_like, lib=_LIBRARY)


class _Held(torch.autograd.Function):
    """A copy through an operator whose output checkpointing can save."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        copy: torch.Tensor = torch.ops.tunesmith.held(x)
        return copy

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _like_flex(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """The same, with inputs saved as checkpointing saves those of compiled flex attention, which returns them."""
    held: Any = _Held  # `apply` is untyped in torch
    query, key, value = (held.apply(each) for each in (query, key, value))
    return _plain_causal(module, query, key, value, mask, **more)


ALL_ATTENTION_FUNCTIONS.register(PLAIN_ATTENTION, _plain_causal)
ALL_ATTENTION_FUNCTIONS.register(LIKE_FLEX, _like_flex)
_NAMES = {"sdpa": PLAIN_ATTENTION, "flex": PLAIN_ATTENTION, "tree": TREE_ATTENTION, "eager": "eager"}


def attention_name(scenario: Scenario) -> str:
    """The name of the attention implementation to use for the scenario."""
    like_flex = scenario.attention == "flex" and scenario.gradient_checkpointing == "keep_attention"
    return LIKE_FLEX if like_flex else _NAMES[scenario.attention]


def quantise(model: Any, dtype: torch.dtype, device: str) -> None:
    """Replace the linear layers of all blocks of a meta model with bitsandbytes' 4-bit ones, one at a time on `device`.

    The weight is a plain parameter with a `quant_state`, since bitsandbytes' `Params4bit` cannot be built from FakeTensors.
    Double quantisation (QLoRA, section 3): blocks of 64 weights with 8-bit constants, which are themselves in blocks of 256.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is model.get_output_embeddings():
            continue
        with torch.device("meta"):
            new = Linear4bit(module.in_features, module.out_features, module.bias is not None, dtype, quant_type="nf4")
        if device == "meta":
            packed, state = _meta_state(module.weight)
        else:
            packed, state = quantize_4bit(_random(module.weight, device), compress_statistics=True, quant_type="nf4")
        new.weight = torch.nn.Parameter(packed, requires_grad=False)
        new.weight.quant_state, new.weight.compress_statistics, new.weight.quant_type = state, True, "nf4"
        new.bias = module.bias
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True


def _random(meta: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype, device=device).normal_(0, _SPREAD)


def _fill(model: torch.nn.Module, device: str) -> None:
    """Replace meta parameters by real ones on `device`: random matrices, norms of one, zero biases; ties are kept."""
    made: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}  # holds the original, so that its id is not reused
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = _random(parameter, device)
                if parameter.dim() == 1:
                    values.fill_(0.0 if name == "bias" else 1.0)
                made[id(parameter)] = (parameter, torch.nn.Parameter(values, parameter.requires_grad))
            module._parameters[name] = made[id(parameter)][1]


def _meta_state(weight: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    """What `quantize_4bit` would return for a weight, without data."""
    blocks = -(-weight.numel() // 64)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inner = QuantState(absmax=made(-(-blocks // 256)), code=made(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=made(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=made(16),
        blocksize=64,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=made(),
        state2=inner,
    )
    return made(-(-weight.numel() // 2), 1, dtype=torch.uint8), state


def quant_tensors(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Where a module's quantisation constants are stored: (holder, attribute) of each tensor."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return []
    return [(state, "absmax"), (state, "code"), (state, "offset"), (state.state2, "absmax"), (state.state2, "code")]


def build_model(config: Any, scenario: Scenario, device: str) -> Any:
    """The real modules of transformers and PEFT for a scenario, on `device` ("meta", "cpu" or "cuda")."""
    dtype = getattr(torch, scenario.dtype)
    adapted = scenario.method != "full"
    on_meta = device == "meta"
    with torch.device(device):
        with nullcontext() if on_meta else init_empty_weights(include_buffers=False):
            attention = attention_name(scenario)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        if scenario.method == "qlora":
            quantise(model, dtype, device)
        if not on_meta:
            model.tie_weights()  # accelerate untied them
            _fill(model, device)
        if scenario.method == "qlora" and scenario.stock:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if not scenario.stock:
            fuse_blocks(model)
        enable_checkpointing(model, scenario.gradient_checkpointing, {*ATTENTION, "tunesmith::held"})
        if adapted:
            # PEFT casts nothing on meta, so the cast is done below.
            settings = AdapterSettings(scenario.r, 2 * scenario.r, 0.0, "all-linear", False, 0, scenario.modules_to_save)
            model = get_peft_model(model, adapter_config(model, settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if adapted and "lora_" in name:
            parameter.data = parameter.data.float()
    if adapted and not scenario.stock:
        fuse_adapters(model)
    return model.train()


def make_optimizer(trained: list[torch.nn.Parameter], scenario: Scenario) -> torch.optim.Optimizer:
    """The scenario's optimizer."""
    if scenario.optim == "adamw_torch_fused":
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if scenario.optim == "adamw_torch_foreach":
        return torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    optimizer = AdamW.named(scenario.optim, trained, store=store_of(offloading=scenario.optimizer_offloading))
    if scenario.optimizer_in_backward:
        InBackward(optimizer, max_grad_norm=1.0)
    return optimizer
