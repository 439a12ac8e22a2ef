"""NaN and Inf stop training before the optimizer step, and an incident records what is known about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.promises.training import Promises
from tunesmith.errors import TrainError
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train
from tunesmith.stages.train.finite import check_weights

Spoil = Callable[[dict[str, torch.Tensor]], None]
METHODS = ("full", "lora", "qlora")


def put(name: str, value: float) -> Spoil:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[7] = value

    return spoil


def scale(factor: float, *names: str) -> Spoil:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            weights[name] = weights[name].float().mul(factor).to(weights[name].dtype)

    return spoil


#: Changes to the base model: non-finite weights, and finite ones whose matmuls or gradients are not finite.
SPOILT: dict[str, Spoil] = {
    "NaN in attention": put("model.layers.0.self_attn.q_proj.weight", float("nan")),
    "infinity in the gate": put("model.layers.1.mlp.gate_proj.weight", float("inf")),
    "minus infinity in a norm": put("model.norm.weight", float("-inf")),
    "products too large": scale(1e22, *(f"model.layers.1.self_attn.{side}_proj.weight" for side in "qk")),
    "gradients too large": scale(3e25, "model.norm.weight"),
}


def spoilt_model(model: Path, folder: Path, spoil: Spoil) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_of(path: Path, model: Path, method: str, more: str = "") -> Run:
    text = f"model: {model}\nmethod: {method}\ndata: {{train: train.jsonl, heldout: 0.1}}\n"
    text += f"train: {{max_steps: 4, effective_batch_size: 8, {more}}}\n"
    run = create_run(parse_recipe(text, "recipe.yaml", path.parent), path)
    prepare(run)
    return run


def incident_of(run: Run) -> Mapping[str, Any]:
    (path,) = (run.path / "train" / "incidents").glob("step-*/incident.json")
    value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def test_nothing_is_trained_on_what_is_no_number(
    tmp_path: Path, tiny_model: Path, colour_rows: Any, write_rows: Any, promises: Promises
) -> None:
    write_rows(colour_rows)
    cases = [(name, method) for name in SPOILT for method in METHODS]
    cases = cases if promises.long else [("NaN in attention", "lora"), ("gradients too large", "full")]
    stopped = 0
    for number, (name, method) in enumerate(cases):
        model = spoilt_model(tiny_model, tmp_path / f"model-{number}", SPOILT[name])
        run = run_of(tmp_path / f"run-{number}", model, method)
        with pytest.raises(TrainError) as caught:
            train(run)
        assert [problem.code for problem in caught.value.problems] == ["TS301"], (name, method)
        assert read_jsonl(run.path / "train" / "metrics.jsonl") == [], (name, method)
        assert not list((run.path / "train").rglob("*.safetensors")), (name, method)
        found = incident_of(run)
        assert found["step"] == 1
        assert len(found["rows"]) == 8
        assert found["causes"][0] in caught.value.problems[0].what
        if name.startswith(("NaN", "infinity")) and method != "qlora":  # four-bit weights cannot hold NaN or Inf
            assert "check the base model" in found["causes"][0], (name, method)
        stopped += 1
    assert stopped == len(cases)
    promises.state("not finite", "count", nonfinite_cases=len(cases), nonfinite_stopped=stopped)


def test_the_rows_of_a_bad_token_are_named(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, colour_rows: Any, write_rows: Any
) -> None:
    """The embedding of one token is NaN: the rows that contain it are named, after steps that succeeded."""
    (token,) = tokenizer.encode("Z", add_special_tokens=False)
    rows = [
        *colour_rows[:30],
        {"messages": [{**turn, "content": turn["content"] + "Z"} for turn in colour_rows[30]["messages"]]},
    ]
    write_rows(rows)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][token] = float("nan")
        weights["lm_head.weight"] = torch.nan_to_num(weights["model.embed_tokens.weight"])

    model = spoilt_model(tiny_model, tmp_path / "model", spoil)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    run = run_of(tmp_path / "run", model, "lora", "save_steps: 1")
    with pytest.raises(TrainError, match=r"1 of 8 rows give a non-finite loss on their own: .*train\.jsonl:31"):
        train(run)
    found = incident_of(run)
    assert [row["where"].rpartition(":")[2] for row in found["rows"] if row["loss"] == "nan"] == ["31"]
    done = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert found["step"] == len(done) + 1
    assert [step["step"] for step in found["last_steps"]] == [step["step"] for step in done]
    saved = list((run.path / "train" / "savepoints").glob("step-*"))
    assert len(saved) == min(2, len(done))  # the last good ones remain


def test_a_save_refuses_a_weight_that_is_no_number() -> None:
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")]), "c": torch.tensor([1, 2])}
    with pytest.raises(TrainError, match="non-finite weights after step 7") as caught:
        check_weights(7, weights)
    assert caught.value.problems[0].where == "b"
    check_weights(7, {name: weights[name] for name in "ac"})
