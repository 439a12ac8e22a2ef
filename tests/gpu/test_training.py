"""Training on a GPU: predictions, real out-of-memory errors, and resume after an interruption."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.conftest import WORDS
from tests.promises.training import signalled, steps_of
from tunesmith.engine.packing.batch import Batch, to_device
from tunesmith.errors import StoppedError
from tunesmith.methods import METHODS
from tunesmith.models.load import make_config
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.building import build_model
from tunesmith.planner.tracing.trace import make_batch, trace, trace_step
from tunesmith.recipe import Checkpointing, Method, parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

STEPS = 12
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(60 + 9 * (i % 9))) for i in range(64)]


def run_of(folder: Path, model: Path, name: str, method: str, train_keys: str) -> Run:
    """A prepared run over raw text."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    recipe = f"""\
model: {model}
method: {method}
objective: pretrain
data: {{train: texts.jsonl, heldout: 0, max_length: 128, duplicates: {{threshold: null}}}}
train: {{max_steps: {STEPS}, effective_batch_size: 8, learning_rate: 0.001, {train_keys}}}
"""
    run = create_run(parse_recipe(recipe, "recipe.yaml", folder), folder / name)
    prepare(run)
    return run


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """The trained weights."""
    (folder,) = (run.path / "train" / "checkpoints").iterdir()
    return {name: tensor.float() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def losses_of(run: Run) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in read_jsonl(run.path / "train" / "metrics.jsonl")]


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on(tmp_path: Path, word_model: Path, method: str) -> None:
    """Each step once, the same losses, and weights that moved the same way.

    A GPU accumulates some sums in no fixed order, and Adam turns a nearly zero gradient into a full step in either direction.
    So a single weight may differ by many rounding steps.
    """
    whole, parts = (run_of(tmp_path, word_model, name, method, "save_steps: 2") for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(StoppedError):
        signalled(parts, signal.SIGTERM, 5)
    train(parts)
    assert steps_of(parts) == list(range(1, STEPS + 1))
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-3)
    expected, found = weights_of(whole), weights_of(parts)
    assert expected.keys() == found.keys()
    start = load_file(word_model / "model.safetensors")
    # An adapter's B starts at zero; its A is random.
    names = [name for name in expected if name in start or "lora_B" in name]
    assert names
    moved = [expected[name] - (start[name].float() if name in start else 0) for name in names]
    apart = [found[name] - expected[name] for name in names]
    assert length(apart) < 0.1 * length(moved)


def length(tensors: list[torch.Tensor]) -> float:
    """The 2-norm over all of them."""
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def test_a_step_that_does_not_fit_is_computed_in_smaller_parts(tmp_path: Path, wide_model: Path, gpu: torch.device) -> None:
    """The allocator is limited to the memory of three quarters of the rows: the same rows, the same losses, and an event."""
    keys = "per_device_train_batch_size: 8, packing: false"
    plenty, little = (run_of(tmp_path, wide_model, name, "full", keys) for name in ("plenty", "little"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    train(plenty)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    states = sum(tensor.numel() * 16 for tensor in weights_of(plenty).values())
    assert peak - before - states > 2**27  # else the allocator's segments dominate
    room = before + states + (peak - before - states) * 3 // 4
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        train(little)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event["code"] for event in little.events("train")].count("out-of-memory") >= 1
    assert losses_of(little) == pytest.approx(losses_of(plenty), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True, "keep_attention"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_asked_for_are_those_of_the_trace(gpu: torch.device, method: Method, checkpointing: Checkpointing) -> None:
    """A real step of a medium-sized model, compared with the same step on FakeTensors: within 2 %."""
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = make_config({"model_type": "qwen2", "vocab_size": 8192, "num_key_value_heads": 2, **shape})
    scenario = Scenario(method, rows=1, length=1024, labelled=512, gradient_checkpointing=checkpointing)
    expected = trace(config, scenario).total_bytes
    before = torch.cuda.memory_allocated()
    model = build_model(config, scenario, "cuda")
    batch: Batch = to_device(make_batch(config, scenario), gpu)
    torch.cuda.reset_peak_memory_stats()
    trace_step(model, batch, scenario)
    assert (torch.cuda.max_memory_allocated() - before) == pytest.approx(expected, rel=0.02)
