"""A loss spike is reported with its rows, and rolled back if the recipe says so; an interruption does not change that."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import chat_row
from tests.promises.training import differing_bits, lines, signalled
from tunesmith.errors import RecipeError, StoppedError, TrainError
from tunesmith.hardware import detect
from tunesmith.methods.settings import settle
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train
from tunesmith.stages.train.spikes import WINDOW, SpikeDetector, is_spike

STEPS = 40


def test_what_is_a_spike() -> None:
    steady = [2.0 + 0.01 * (number % 5) for number in range(WINDOW)]
    assert is_spike(4.0, steady)
    assert not is_spike(2.1, steady)  # an outlier by the spread, but less than 1.5 x the median
    assert not is_spike(4.0, steady[:11])  # too few to compare with
    assert not is_spike(4.0, [1.0, 3.0] * 16)  # the spread is as wide
    assert not is_spike(0.1, steady)


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, write_rows: Any) -> Callable[..., Run]:
    """Rows that are all alike and soon memorised, except for a few with nonsense answers."""

    def make(name: str, more: str = "") -> Run:
        rows = [chat_row(f"Say yes, number {number}", "yes, yes, yes, yes") for number in range(120)]
        for number in (37, 38, 39, 40):
            letters = random.Random(number).choices("bcdfghjklmnpqrstvwxz", k=180)
            rows[number] = chat_row(f"Say yes {number}", " ".join("".join(letters[at : at + 3]) for at in range(0, 180, 3)))
        write_rows(rows)
        text = f"model: {tiny_model}\nmethod: full\ndata: {{train: train.jsonl, heldout: 0, quality: {{repetition: off}}}}\n"
        text += f"train: {{max_steps: {STEPS}, effective_batch_size: 2, learning_rate: 0.01, lr_scheduler_type: constant, "
        text += f"save_steps: 2, {more}}}\n"
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / name)
        prepare(run)
        return run

    return make


def spikes(run: Run, code: str = "loss-spike") -> list[dict[str, Any]]:
    return [event for event in run.events("train") if event["code"] == code]


def test_a_spike_is_told_with_its_rows(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    train(run)
    found = spikes(run)
    assert found
    nonsense = {
        event["step"] for event in found if event["rows"][0].endswith(tuple(f".jsonl:{line}" for line in range(38, 42)))
    }
    assert len(nonsense) >= 2
    for event in found:
        # The effect of nonsense rows may show in the next step: how much depends on the processor's rounding.
        assert event["step"] in nonsense or event["step"] - 1 in nonsense
        assert len(event["rows"]) == 2
        assert event["loss"] > 1.5 * event["median"]
    assert not spikes(run, "rolled-back")
    assert len(lines(run.path / "train" / "metrics.jsonl")) == STEPS


def test_going_back_undoes_it_whenever_it_is_interrupted(make_run: Callable[..., Run]) -> None:
    whole, parts = (make_run(name, "on_spike: rollback") for name in ("whole", "parts"))
    train(whole)
    back = spikes(whole, "rolled-back")
    assert back
    assert all(event["to"] < event["step"] and event["to"] % 2 == 0 for event in back)
    first = back[0]["step"]
    for after in (first - 2, first):  # just before it, and after it is rolled back
        with pytest.raises(StoppedError):
            signalled(parts, signal.SIGTERM, after)
    train(parts)
    assert lines(parts.path / "train" / "metrics.jsonl") == lines(whole.path / "train" / "metrics.jsonl")
    assert spikes(parts) == spikes(whole)
    assert spikes(parts, "rolled-back") == back
    assert differing_bits(*(run.path / "train" / "checkpoints" for run in (whole, parts))) == 0
    other = make_run("other")
    train(other)
    weights = [next((run.path / "train" / "checkpoints").rglob("model.safetensors")) for run in (whole, other)]
    one, two = (load_file(path) for path in weights)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_loss_that_spikes_again_and_again_ends_the_training() -> None:
    """Training rolls back three times; a fourth spike within the window ends it, one after the window does not."""
    asked = parse_recipe("model: m\ndata: {train: t}\ntrain: {on_spike: rollback, save_steps: 2}", "r", Path()).recipe
    settings = settle(asked, 100, detect())
    back: list[int] = []
    earlier: Any = SimpleNamespace(savepoints=SimpleNamespace(newest=lambda every: SimpleNamespace(step=every)))
    engine: Any = SimpleNamespace(roll_back=lambda saved: back.append(saved.step))
    watch = SpikeDetector(settings, earlier, lambda *_, **__: None)
    for step in (20, 30, 40):
        watch._roll_back(engine, step)
    after = SpikeDetector(settings, earlier, lambda *_, **__: None)
    after.go_on(watch.as_dict())
    with pytest.raises(TrainError, match="has spiked at step 50 after rollbacks at steps 20, 30, 40") as caught:
        watch._roll_back(engine, 50)
    assert caught.value.problems[0].code == "TS313"
    after._roll_back(engine, 20 + WINDOW)
    assert back == [2, 2, 2, 2]


def test_where_to_go_back_to_must_be_known() -> None:
    with pytest.raises(RecipeError, match="on_spike: rollback without a number for save_steps"):
        parse_recipe("model: m\ndata: {train: t}\ntrain: {on_spike: rollback}", "r", Path())
    with pytest.raises(RecipeError, match=r"train.on_spike with objective: kto"):
        parse_recipe("model: m\nobjective: kto\ndata: {train: t}\ntrain: {on_spike: rollback, save_steps: 1}", "r", Path())
