"""The comparison's figures and texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tunesmith.stages.compare.plots import loss_curves
from tunesmith.stages.compare.stage import bootstrap_ratio
from tunesmith.stages.compare.text import amount, cells, verdict


def row(method: str, score: float, interval: list[float] | None = None, **extra: float) -> dict[str, object]:
    base = {
        "model": method,
        "method": method,
        "trainable_parameters": None,
        "peak_memory_bytes": None,
        "seconds_per_step": None,
        "tokens_per_second": None,
        "checkpoint_bytes": None,
        "eval_loss": 0.5,
        "task_score": score,
        "effectiveness": None if interval is None else 100 * score,
        "effectiveness_interval": interval,
        "of_best_interval": interval,
        "train_seconds": 60.0,
    }
    return {**base, **extra}


def test_bootstrap_covers_the_ratio_and_is_paired() -> None:
    generator = np.random.default_rng(1)
    full = (generator.random(400) < 0.8).astype(float)
    assert bootstrap_ratio(full, full) == [100.0, 100.0]  # paired: identical answers have no spread
    worse = full * (generator.random(400) < 0.9)
    low, high = bootstrap_ratio(worse, full)
    assert low < 100 * worse.mean() / full.mean() < high
    assert 2 < high - low < 10
    assert bootstrap_ratio([0.0, 0.0], [1.0, 0.5]) == [0.0, 0.0]


def test_bootstrap_interval_has_its_coverage() -> None:
    """Of 200 samples of 100 rows, about 95 % of the intervals contain the true ratio (the bound is 4 sigma wide)."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        full = (generator.random(100) < 0.8).astype(float)
        other = (generator.random(100) < 0.72).astype(float)
        low, high = bootstrap_ratio(other, full)
        hits += low <= 90.0 <= high
    assert 176 <= hits <= 200


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (999, "999"), (1_234, "1.2 K"), (134_515_008, "134.5 M"), (7e9, "7.0 B")]
)
def test_amount(count: float | None, text: str) -> None:
    assert amount(count) == text


def test_cells_of_the_base_model_are_dashes() -> None:
    (line,) = cells([row("base", 0.0)])
    assert line == ["base", "-", "-", "-", "-", "0.500", "0.0 %", "-", "-"]


def test_verdict_names_the_leanest_that_is_close_to_full() -> None:
    facts = {"trainable_parameters": 10, "peak_memory_bytes": 2**30}
    rows = [
        row("base", 0.0, [0.0, 0.0]),
        row("full", 0.99, [100, 100], trainable_parameters=100, peak_memory_bytes=4 * 2**30),
        row("lora", 0.97, [95.0, 99.0], **{**facts, "peak_memory_bytes": 2 * 2**30}),
        row("qlora", 0.5, [50.0, 60.0], **facts),
    ]
    text = verdict(rows)
    assert text.startswith("full scored best: 99.0 % of the task against 0.0 % for the base model")
    assert "lora reaches 97.0 %" in text
    assert "qlora" not in text
    # Runs that the interval cannot separate are a tie, and the cheapest is named.
    rows[2]["of_best_interval"] = [95.0, 101.0]
    text = verdict(rows)
    assert text.startswith("A tie: full 99.0 %, lora 97.0 % of the task against 0.0 % for the base model")
    assert "lora took the least memory" not in text
    assert "lora is the cheapest of them: 10 trainable parameters, 2.00 GiB at peak, 1.0 minutes of training" in text
    rows[1]["train_seconds"] = 30.0
    assert "lora took the least memory (10 trainable parameters, 2.00 GiB at peak, 1.0 minutes of training), " in verdict(rows)
    assert verdict(rows).endswith("full the least time (0.5 minutes of training).")
    rows[0].update(task_score=0.96, of_best_interval=[94.0, 100.5])
    assert "do not distinguish full (99.0 % of the task) from the base model (96.0 %)" in verdict(rows)
    assert verdict([row("base", 0.5), row("lora", 0.5)]).startswith("No method beats the base model's 50.0 %")


@pytest.mark.parametrize(
    ("losses", "labels"),
    [([1.03, 0.5, 0.1, 0.02], {"0.1", "1"}), ([0.9, 0.7, 0.6, 0.5], {"0.5", "0.6", "0.7", "0.8", "0.9"})],
)
def test_losses_are_labelled_with_plain_numbers(losses: list[float], labels: set[str]) -> None:
    steps = [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, start=100)]
    page = loss_curves({"a $x$ run": steps}, {"a $x$ run": "lora"})
    assert labels <= set(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    assert "mathdefault" not in page
    assert "a $x$ run" in page
