"""Evaluating the held-out loss does not change training, keeps the best checkpoint, and stops early where it should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.training import MakeRecipe, metrics, trained, weights
from tunesmith.errors import RecipeError
from tunesmith.io.atomic import read_json
from tunesmith.runs import Run, read_jsonl
from tunesmith.stages.train.evaluation import EvaluationCallback


def summary(run: Run) -> Any:
    return read_json(run.path / "train" / "summary.json")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_changes_nothing(make_recipe: MakeRecipe, tmp_path: Path, method: str, dtype: str) -> None:
    common = {"method": method, "train__compute_dtype": dtype, "train__max_steps": 6, "train__learning_rate": 2e-3}
    plain = trained(make_recipe, tmp_path / "plain", **common)
    watched = trained(make_recipe, tmp_path / "watched", train__eval_steps=2, **common)
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert metrics(plain, *names) == metrics(watched, *names)
    looks = read_jsonl(watched.path / "train" / "evals.jsonl")
    assert [look["step"] for look in looks] == [2, 4, 6]
    facts = summary(watched)
    assert facts["best_eval_loss"] == min(look["eval_loss"] for look in looks)
    if facts["best_step"] == 6:
        one, two = weights(plain), weights(watched)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_best_checkpoint_is_kept_and_training_stops(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A rate at which a few rows are soon memorised: the held-out loss first falls and then rises."""
    rate = {"train__learning_rate": 0.05, "train__lr_scheduler_type": "constant", "train__warmup_ratio": 0}
    more = {"train__max_steps": 200, "train__eval_steps": 5, "train__early_stopping_patience": 3, "lora__r": 32}
    run = trained(make_recipe, tmp_path / "run", method="lora", **more, **rate)
    looks, facts = read_jsonl(run.path / "train" / "evals.jsonl"), summary(run)
    assert facts["stopped_early"]
    assert facts["steps"] < 200
    best = min(looks, key=lambda look: look["eval_loss"])
    assert facts["best_step"] == best["step"] == looks[-4]["step"]
    assert facts["checkpoint"] == f"train/checkpoints/step-{best['step']:06d}"
    assert [folder.name for folder in (run.path / "train" / "checkpoints").iterdir()] == [f"step-{best['step']:06d}"]
    assert "stopped-early" in {event["code"] for event in run.events("train")}
    # The weights are from that step, not from the last one.
    short = trained(make_recipe, tmp_path / "short", method="lora", lora__r=32, train__max_steps=best["step"], **rate)
    one, two = weights(run), weights(short)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def looked(losses: list[float], train: list[float], patience: int | None = None) -> tuple[list[str], list[int], bool]:
    """Events, saved steps and whether training stopped, for an evaluation callback that sees these losses."""
    events: list[str] = []
    saved: list[int] = []
    given = iter(losses)
    watch = EvaluationCallback(
        every=1,
        patience=patience,
        path=Path("/dev/null"),
        evaluate=lambda: next(given),
        save=saved.append,
        losses=lambda: train,
        tell=lambda code, _: events.append(code),
    )
    control = SimpleNamespace(should_training_stop=False)
    for step in range(1, len(losses) + 1):
        watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=100), control)
    return events, saved, control.should_training_stop


def test_overfitting_is_told_once_where_it_begins() -> None:
    falling = [3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    assert looked([2.0, 1.5, 1.6, 1.7, 1.8, 1.9], falling)[0] == ["overfitting"]
    assert looked([2.0, 1.5, 1.6, 1.5, 1.6, 1.5], falling)[0] == []
    assert looked([2.0, 1.5, 1.6, 1.7, 1.8, 1.9], [3.0] * 6)[0] == []


def test_patience_counts_looks_without_a_new_best() -> None:
    assert looked([3, 2, 2.1, 2.2], [1.0] * 4, patience=3) == ([], [1, 2], False)
    assert looked([3, 2, 2.1, 2.2, 2.0], [1.0] * 5, patience=3) == (["stopped-early"], [1, 2], True)


def test_what_cannot_be_watched_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without eval_steps"):
        trained(make_recipe, tmp_path / "one", train__early_stopping_patience=2)
    with pytest.raises(RecipeError, match="no rows are held out"):
        trained(make_recipe, tmp_path / "two", train__eval_steps=2, data__heldout=0)
