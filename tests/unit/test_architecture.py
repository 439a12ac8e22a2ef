"""Parameter counts from config.json equal those of transformers' own modules, kind by kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.errors import ModelError
from tunesmith.models.architecture import Architecture
from tunesmith.models.families import FAMILIES, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
CASES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama tied": {**SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES,
    "qwen2": {key: value for key, value in SIZES.items() if key != "head_dim"},
    "qwen3": SIZES,
    "gemma": SIZES,
    "gemma2": SIZES,
    "gemma3_text": SIZES,
    "phi": {key: value for key, value in SIZES.items() if key != "head_dim"},
    "phi3": {**{key: value for key, value in SIZES.items() if key != "head_dim"}, "pad_token_id": 0},
    "glm": {**SIZES, "pad_token_id": 0, "attention_bias": True},
    "glm4": {**SIZES, "pad_token_id": 0, "attention_bias": True},
    "mixtral": {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        **MOE,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {**SIZES, **MOE},
}


def build(case: str) -> tuple[Any, Architecture]:
    config = AutoConfig.for_model(case.split(maxsplit=1)[0], **CASES[case])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model, read_architecture(json.loads(config.to_json_string(use_diff=False)))


def test_every_architecture_has_a_case() -> None:
    assert {case.split()[0] for case in CASES} | {"chatglm"} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_modules(case: str) -> None:
    model, architecture = build(case)
    assert architecture.parameters == sum(p.numel() for p in model.parameters())
    assert architecture.embedding_parameters == model.get_input_embeddings().weight.numel()
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name}
    assert architecture.linear_weights == sum(m.weight.numel() for m in blocks.values())
    assert {linear.name.split(".")[-1] for linear in architecture.all_linears} == {name.split(".")[-1] for name in blocks}


@pytest.mark.parametrize("case", [case for case in CASES if "moe" not in case and case != "mixtral"])
def test_adapter_count_equals_peft(case: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, architecture = build(case)
    with torch.device("meta"):
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert architecture.lora_parameters(4) == trainable


#: Published counts of well-known models.
KNOWN = {
    "Qwen2-7B": (
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46_702_792_704,
    ),
    "chatglm3-6b": (
        {
            "model_type": "chatglm",
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "num_layers": 28,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "padded_vocab_size": 65024,
            "add_qkv_bias": True,
        },
        6_243_584_000,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(name: str) -> None:
    values, parameters = KNOWN[name]
    assert read_architecture(values).parameters == parameters


def test_active_parameters_of_mixtral() -> None:
    assert read_architecture(KNOWN["Mixtral-8x7B"][0]).active_parameters == 12_879_925_248


@pytest.mark.parametrize(
    ("values", "code", "what"),
    [
        ({}, "TS208", "model_type"),
        ({"model_type": "mamba"}, "TS209", "mamba"),
        ({"model_type": "llama"}, "TS208", "no '"),
        ({**KNOWN["Qwen2-7B"][0], "vocab_size": -1}, "TS208", "vocab_size"),
        ({**KNOWN["Qwen2-7B"][0], "num_hidden_layers": "28"}, "TS208", "num_hidden_layers"),
        ({**KNOWN["Qwen2-7B"][0], "tie_word_embeddings": "no"}, "TS208", "tie_word_embeddings"),
    ],
)
def test_bad_configs_are_named(values: dict[str, Any], code: str, what: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_architecture(values)
    assert caught.value.problems[0].code == code
    assert what in caught.value.problems[0].what
