"""A longer window: fused blocks stay exact, and plain transformers loads the exported model with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.conftest import chat_row
from tests.support.models import assert_equal, results
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.models.load import load_model
from tunesmith.recipe import RopeScalingSection
from tunesmith.runs import create_run
from tunesmith.stages.export import export
from tunesmith.stages.export.stage import trained_method
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

KINDS = ("linear", "yarn")


@pytest.fixture
def short_model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model with a window of 32 positions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.max_position_embeddings = 32
    folder = tmp_path / "short"
    model.save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in tiny_model.glob("*.jinja"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_are_exact_with_scaled_positions(short_model: Path, kind: Any) -> None:
    theirs = load_model(short_model, dtype="float64", rope_scaling=RopeScalingSection(rope_type=kind, factor=4)).train()
    if kind == "yarn":
        assert theirs.model.rotary_emb.attention_scaling > 1
    plain = load_model(short_model, dtype="float64").train()
    mine = copy.deepcopy(theirs)
    fuse_blocks(mine)
    assert_equal(results(mine), results(theirs), 1e-5)  # transformers' norms compute in float32
    assert not torch.allclose(results(plain)["logits"], results(mine)["logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_exported_with_a_longer_window(
    make_recipe: Any, write_rows: Any, short_model: Path, tmp_path: Path, kind: str, method: str
) -> None:
    rows = write_rows([chat_row(f"Number {i}? " + "tell me " * 30, "yes") for i in range(16)], "long.jsonl")
    scaling = {"rope_type": kind, "factor": 8}
    more = {"model": str(short_model), "data__train": str(rows), "method": method, "train__compute_dtype": "float32"}
    run = create_run(make_recipe(rope_scaling=scaling, **more), tmp_path / "run")
    prepare(run)
    assert "rows-beyond-window" not in [event["code"] for event in run.events("data")]
    train(run, Console(quiet=True))
    export(run)
    folder = run.path / "export" / "merged"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"]["rope_type"] == kind
    assert config["rope_parameters"]["factor"] == 8
    trained, checkpoint = trained_method(run)
    ids = torch.arange(100, 200)[None]
    with torch.no_grad():
        expected = trained.load_trained(checkpoint).eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_rows_beyond_the_window_are_told(make_recipe: Any, write_rows: Any, short_model: Path, tmp_path: Path) -> None:
    rows = write_rows([chat_row(f"Number {i}? " + "tell me " * 30, "yes") for i in range(8)], "long.jsonl")
    run = create_run(make_recipe(model=str(short_model), data__train=str(rows)), tmp_path / "run")
    prepare(run)
    (event,) = [event for event in run.events("data") if event["code"] == "rows-beyond-window"]
    assert (event["count"], event["window"]) == (8, 32)
