"""The known model families: the properties of each one's modelling code that this package needs, one row per family.

tests/unit/test_architecture.py builds each with transformers on the meta device and compares every parameter count;
tests/invariant/test_packing.py verifies each family that supports prefix trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import ModelError, Problem
from tunesmith.models.architecture import Architecture, Experts, Linear


class _Config:
    """Typed look-ups in a config.json, with errors that name the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def size(self, *names: str, default: int | None = None) -> int:
        """The positive integer under the first of `names` that is present."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                    raise _bad(f"{name} = {str(value)[:60]!r} is not a positive whole number", self.source)
                return value
        if default is None:
            raise _bad(f"no {names[0]!r}", self.source)
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise _bad(f"{name} = {str(value)[:60]!r} is not true or false", self.source)
        return value


def _bad(what: str, source: str) -> ModelError:
    why = "memory and time are computed from the model's shape"
    return ModelError(Problem("TS208", what, source, why, "give a complete config.json, as written by save_pretrained"))


def _attention(config: _Config, *, qkv_bias: bool, out: str = "o_proj", out_bias: bool = False) -> tuple[Linear, ...]:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head = config.size("head_dim", default=hidden // heads)
    groups = config.size("num_key_value_heads", default=heads)
    if heads % groups:
        raise _bad(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}", config.source)
    kv = groups * head
    return (
        Linear("q_proj", hidden, heads * head, qkv_bias),
        Linear("k_proj", hidden, kv, qkv_bias),
        Linear("v_proj", hidden, kv, qkv_bias),
        Linear(out, heads * head, hidden, out_bias),
    )


def _gated(config: _Config, size: int, *, fused: bool = False) -> tuple[Linear, ...]:
    hidden = config.size("hidden_size")
    if fused:
        return (Linear("gate_up_proj", hidden, 2 * size), Linear("down_proj", size, hidden))
    return (Linear("gate_proj", hidden, size), Linear("up_proj", hidden, size), Linear("down_proj", size, hidden))


def _build(config: _Config, linears: tuple[Linear, ...], **given: Any) -> Architecture:
    """The architecture with the sizes whose keys all configs share; `norms` is in units of the hidden size."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    norms = given.pop("norms", 2) * hidden + given.pop("extra_norms", 0)
    window = config.values.get("sliding_window")
    fields: dict[str, Any] = {
        "model_type": str(config.values["model_type"]),
        "hidden_size": hidden,
        "intermediate_size": config.size("intermediate_size", default=4 * hidden),
        "num_hidden_layers": config.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.size("num_key_value_heads", default=heads),
        "head_dim": config.size("head_dim", default=hidden // heads),
        "vocab_size": config.size("vocab_size"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", default=False),
        "linears": linears,
        "norms_per_block": norms,
        "final_norm": hidden,
        "max_position_embeddings": config.values.get("max_position_embeddings"),
        "sliding_window": window if config.flag("use_sliding_window", default=True) else None,
    }
    return Architecture(**{**fields, **given})


def _llama(config: _Config) -> Architecture:
    bias = config.flag("attention_bias", default=False)
    mlp = config.flag("mlp_bias", default=False)
    gated = _gated(config, config.size("intermediate_size"))
    gated = tuple(Linear(part.name, part.in_features, part.out_features, mlp) for part in gated)
    return _build(config, _attention(config, qkv_bias=bias, out_bias=bias) + gated)


def _mistral(config: _Config) -> Architecture:
    return _build(config, _attention(config, qkv_bias=False) + _gated(config, config.size("intermediate_size")))


def _qwen2(config: _Config) -> Architecture:
    linears = _attention(config, qkv_bias=True) + _gated(config, config.size("intermediate_size"))
    return _build(config, linears)


def _with_qk_norm(config: _Config, linears: tuple[Linear, ...], **given: Any) -> Architecture:
    head = config.size("head_dim", default=config.size("hidden_size") // config.size("num_attention_heads"))
    return _build(config, linears, extra_norms=2 * head, **given)


def _qwen3(config: _Config) -> Architecture:
    bias = config.flag("attention_bias", default=False)
    config = _Config({"head_dim": 128, **config.values}, config.source)
    linears = _attention(config, qkv_bias=bias, out_bias=bias) + _gated(config, config.size("intermediate_size"))
    return _with_qk_norm(config, linears)


def _gemma(config: _Config, *, norms: int = 2, qk_norm: bool = False) -> Architecture:
    config = _Config({"head_dim": 256, "tie_word_embeddings": True, **config.values}, config.source)
    bias = config.flag("attention_bias", default=False)
    linears = _attention(config, qkv_bias=bias, out_bias=bias) + _gated(config, config.size("intermediate_size"))
    return _with_qk_norm(config, linears, norms=norms) if qk_norm else _build(config, linears, norms=norms)


def _gemma2(config: _Config) -> Architecture:
    return _gemma(config, norms=4)


def _gemma3(config: _Config) -> Architecture:
    return _gemma(config, norms=4, qk_norm=True)


def _phi(config: _Config) -> Architecture:
    hidden, size = config.size("hidden_size"), config.size("intermediate_size")
    mlp = (Linear("fc1", hidden, size, bias=True), Linear("fc2", size, hidden, bias=True))
    linears = _attention(config, qkv_bias=True, out="dense", out_bias=True) + mlp
    # One layer norm with weight and bias per block, and one at the end.
    return _build(config, linears, norms=2, final_norm=2 * hidden, head_bias=True)


def _phi3(config: _Config) -> Architecture:
    q, k, v, out = _attention(config, qkv_bias=False)
    qkv = Linear("qkv_proj", q.in_features, q.out_features + k.out_features + v.out_features)
    return _build(config, (qkv, out, *_gated(config, config.size("intermediate_size"), fused=True)))


def _glm(config: _Config, *, norms: int = 2) -> Architecture:
    config = _Config({"head_dim": 128, **config.values}, config.source)
    linears = _attention(config, qkv_bias=config.flag("attention_bias", default=False))
    return _build(config, linears + _gated(config, config.size("intermediate_size"), fused=True), norms=norms)


def _glm4(config: _Config) -> Architecture:
    return _glm(config, norms=4)


def _chatglm(config: _Config) -> Architecture:
    """ChatGLM 2/3 and GLM-4-9B as first published; their code is not in transformers, their shape is that of glm."""
    heads = config.size("num_attention_heads")
    groups = config.size("multi_query_group_num") if config.flag("multi_query_attention", default=False) else heads
    renamed = {
        **config.values,
        "intermediate_size": config.size("ffn_hidden_size"),
        "num_hidden_layers": config.size("num_layers", "num_hidden_layers"),
        "num_key_value_heads": groups,
        "head_dim": config.size("kv_channels", default=config.size("hidden_size") // heads),
        "vocab_size": config.size("padded_vocab_size", "vocab_size"),
        "attention_bias": config.flag("add_qkv_bias", default=False),
        "tie_word_embeddings": False,
    }
    return _glm(_Config(renamed, config.source))


def _mixtral(config: _Config) -> Architecture:
    hidden, count = config.size("hidden_size"), config.size("num_local_experts", "num_experts")
    size = config.size("intermediate_size")
    experts = Experts(count, config.size("num_experts_per_tok"), size, router=count * hidden)
    return _build(config, _attention(config, qkv_bias=False), experts=experts)


def _every_block_sparse(config: _Config) -> None:
    if config.values.get("mlp_only_layers") or config.size("decoder_sparse_step", default=1) != 1:
        raise _bad("mixed dense and sparse blocks (mlp_only_layers or decoder_sparse_step) are not supported", config.source)


def _qwen2_moe(config: _Config) -> Architecture:
    _every_block_sparse(config)
    hidden, count = config.size("hidden_size"), config.size("num_experts", "num_local_experts")
    shared = tuple(
        Linear(f"shared_expert.{part.name}", part.in_features, part.out_features)
        for part in _gated(config, config.size("shared_expert_intermediate_size"))
    )
    shared += (Linear("shared_expert_gate", hidden, 1),)
    per_token, size = config.size("num_experts_per_tok"), config.size("moe_intermediate_size")
    experts = Experts(count, per_token, size, router=count * hidden, shared=shared)
    return _build(config, _attention(config, qkv_bias=config.flag("qkv_bias", default=True)), experts=experts)


def _qwen3_moe(config: _Config) -> Architecture:
    _every_block_sparse(config)
    hidden, count = config.size("hidden_size"), config.size("num_experts", "num_local_experts")
    bias = config.flag("attention_bias", default=False)
    experts = Experts(count, config.size("num_experts_per_tok"), config.size("moe_intermediate_size"), router=count * hidden)
    return _with_qk_norm(config, _attention(config, qkv_bias=bias, out_bias=bias), experts=experts)


@dataclass(frozen=True)
class Style:
    """How a family's code differs from llama's, as far as it affects memory."""

    norm: Literal["llama", "gemma", "layer"] = "llama"
    qk_norm: bool = False
    post_norms: bool = False  # norms also after attention and MLP
    parallel: bool = False  # attention and MLP read the same norm
    written_out_gelu: bool = False
    scaled_embedding: bool = False
    capped_logits: bool = False
    own_rotary: bool = False  # each block computes its own cosines and sines, for half a head
    copied_result: bool = False  # queries are concatenated after a partial rotary embedding: attention's result is copied


@dataclass(frozen=True)
class Family:
    """A model type.

    `shape` reads a config.json. `style` holds the properties that affect memory. `causal_rotary`: attention is causal with one
    rotary embedding over the whole head for all layers, without sinks or soft-capping, so that prefix trees reproduce it
    exactly and its positions can be scaled. `norm_offset` is added to a norm's weight. `in_transformers`: transformers has its
    code, and its tensors have the names of the linear layers here.
    """

    shape: Callable[[_Config], Architecture]
    style: Style = Style()
    causal_rotary: bool = False
    norm_offset: float = 0.0
    in_transformers: bool = True


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama, causal_rotary=True),
    "mistral": Family(_mistral, causal_rotary=True),
    "qwen2": Family(_qwen2, causal_rotary=True),
    "qwen3": Family(_qwen3, Style(qk_norm=True), causal_rotary=True),
    "gemma": Family(_gemma, Style(norm="gemma", scaled_embedding=True), causal_rotary=True, norm_offset=1.0),
    "gemma2": Family(_gemma2, Style(norm="gemma", post_norms=True, scaled_embedding=True, capped_logits=True)),
    "gemma3_text": Family(_gemma3, Style(norm="gemma", post_norms=True, qk_norm=True, scaled_embedding=True)),
    "phi": Family(_phi, Style(norm="layer", parallel=True, written_out_gelu=True, copied_result=True)),
    "phi3": Family(_phi3, Style(copied_result=True)),
    "glm": Family(_glm, Style(own_rotary=True, copied_result=True)),
    "glm4": Family(_glm4, Style(own_rotary=True, post_norms=True, copied_result=True)),
    "chatglm": Family(_chatglm, Style(own_rotary=True, copied_result=True), in_transformers=False),
    "mixtral": Family(_mixtral),
    "qwen2_moe": Family(_qwen2_moe),
    "qwen3_moe": Family(_qwen3_moe, Style(qk_norm=True)),
}


def family_of(model_type: Any) -> Family | None:
    """The family for a config.json's model type; None if it is not known."""
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def runs_on_trees(model_type: Any) -> bool:
    """Whether prefix trees compute the same results as separate rows for this model type."""
    family = family_of(model_type)
    return family is not None and family.causal_rotary


def read_architecture(values: Mapping[str, Any], source: str = "config.json") -> Architecture:
    """The architecture that a parsed config.json describes. Raises ModelError if it is incomplete or not supported."""
    text = values.get("text_config")
    if isinstance(text, dict) and text.get("model_type") in FAMILIES:
        values = text  # a multi-modal model's language part
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise _bad("no 'model_type'", source)
    if model_type not in FAMILIES:
        why = "its memory could only be guessed"
        fix = f"supported: {', '.join(FAMILIES)}"
        raise ModelError(Problem("TS209", f"architecture {model_type[:60]!r} is not supported", source, why, fix))
    return FAMILIES[model_type].shape(_Config(values, source))
