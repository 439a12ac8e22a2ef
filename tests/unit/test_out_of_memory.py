"""Out of memory: how it is detected, how the step is split, and which setting to change."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.recipes import GPU
from tunesmith.engine.packing.batch import PaddedCollator, StepCollator
from tunesmith.engine.packing.tree import Limits
from tunesmith.methods.settings import Settings, settle
from tunesmith.recipe import parse_recipe
from tunesmith.stages.train import out_of_memory as out_of_memory_module
from tunesmith.stages.train.out_of_memory import in_smaller_parts, is_out_of_memory, next_lever, out_of_memory


def settings_of(more: str) -> Settings:
    """As on a GPU, which honours all keys."""
    return settle(parse_recipe(f"model: m\ndata: {{train: t}}\n{more}", "r", Path()).recipe, 100, GPU)


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("sizes of tensors must match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("text", ["could not create a primitive", "could not execute a primitive"])
def test_an_error_without_a_reason_is_out_of_memory_only_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    error = RuntimeError(text)
    assert not is_out_of_memory(error)
    with monkeypatch.context() as patch:
        patch.setattr(out_of_memory_module, "_ROOM", 1 << 60)  # more than any machine has
        assert is_out_of_memory(error)
    monkeypatch.setattr(out_of_memory_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    monkeypatch.setattr(out_of_memory_module.torch, "empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no room")))
    assert is_out_of_memory(error)


def test_the_same_rows_in_smaller_parts() -> None:
    rows = [{"input_ids": list(range(length)), "loss_mask": [True] * length} for length in (4, 4, 4, 4, 30)]
    batches = StepCollator(PaddedCollator(0), Limits(None, None))
    whole = batches(rows)["micro_batches"]
    made, tokens = len(whole), whole[0]["input_ids"].numel()
    seen = []
    while (smaller := in_smaller_parts(batches, rows, made, tokens)) is not None:
        assert sum(batch["row_tokens"] for batch in smaller) == 46
        assert len(smaller) > made
        made, tokens = len(smaller), max(batch["input_ids"].numel() for batch in smaller)
        seen.append(made)
    assert seen[-1] == 5  # one row per micro-batch
    assert batches.limits.tokens is not None


def test_the_next_lever_is_named_with_bytes(model: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    first = next_lever(settings_of("method: full"), model, 50)
    assert first == f"train.gradient_checkpointing: true (keeps {3 * 50 * 8 * 2:,} bytes of the row, and recomputes the rest)"
    assert next_lever(settings_of("method: full\ntrain: {gradient_checkpointing: keep_attention}"), model, 50) == first
    checkpointing = "train: {gradient_checkpointing: true}"
    second = next_lever(settings_of(f"method: full\n{checkpointing}"), model, 50)
    assert second is not None
    assert f"instead of {12 * count:,}" in second  # two float32 states and a master
    assert second.startswith("train.optim: adamw_8bit")
    third = next_lever(settings_of("method: full\ntrain: {gradient_checkpointing: true, optim: adamw_8bit}"), model, 50)
    assert third is not None
    assert third.startswith("method: lora")
    elsewhere = copy.deepcopy(model).to("meta")  # as on a GPU: not in host memory
    full = "method: full\ntrain: {gradient_checkpointing: true, optim: adamw_8bit"
    assert str(next_lever(settings_of(f"{full}}}"), elsewhere, 50)).startswith("train.optimizer_offloading: true")
    assert next_lever(settings_of(f"{full}, optimizer_offloading: true}}"), elsewhere, 50) == third
    fourth = next_lever(settings_of(f"method: lora\n{checkpointing}"), model, 50)
    assert fourth is not None
    assert fourth.startswith("method: qlora")
    assert f"instead of {2 * count:,}" in fourth
    assert next_lever(settings_of(f"method: qlora\n{checkpointing}"), model, 50) is None
    assert next_lever(settings_of("method: lora"), model, 0) == fourth  # no row was computed: activations are not the cause


def test_the_error_says_what_and_how(model: Any) -> None:
    (problem,) = out_of_memory(settings_of("method: lora"), model, 50, "CUDA out of memory. Tried\nto allocate").problems
    assert problem.code == "TS312"
    assert "one row of 50 tokens" in problem.what
    assert "Tried to allocate" in problem.why
    (problem,) = out_of_memory(settings_of("train: {optimizer_in_backward: true}"), model, 50, "").problems
    assert "lower train.per_device_train_batch_size" in problem.fix
