"""Forgetting: changes, their intervals, and the verdicts on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunesmith.stages.compare.forgetting import add_changes, change_interval, forgetting_cells, forgetting_verdict


def rows(*accuracies: tuple[str, float | None], questions: int = 1000) -> list[dict[str, Any]]:
    return [
        {
            "model": method,
            "method": method,
            "mmlu": None
            if accuracy is None
            else {
                "accuracy": accuracy,
                "standard_error": (accuracy * (1 - accuracy) / (questions - 1)) ** 0.5,
                "questions": questions,
            },
        }
        for method, accuracy in accuracies
    ]


def answered(table: list[dict[str, Any]]) -> dict[str, list[bool]]:
    """Answers whose first questions are right, as many as the accuracy says."""
    made = {}
    for row in table:
        facts = row["mmlu"] or {"accuracy": 0, "questions": 0}
        right = round(facts["accuracy"] * facts["questions"])
        made[row["model"]] = [number < right for number in range(facts["questions"])]
    return made


def test_changes_and_the_gate() -> None:
    table = rows(("base", 0.6), ("full", 0.5), ("lora", 0.58), ("qlora", None))
    add_changes(table, answered(table))
    full, lora = table[1]["mmlu"], table[2]["mmlu"]
    assert "change_points" not in table[0]["mmlu"]
    assert table[3]["mmlu"] is None
    assert full["change_points"] == pytest.approx(-10)
    assert full["lost_percent"] == pytest.approx(100 / 6)
    assert full["forgot"]
    assert lora["lost_percent"] == pytest.approx(10 / 3)
    assert not lora["forgot"]
    assert full["change_interval"][0] < -10 < full["change_interval"][1] < 0
    text = str(forgetting_verdict(table))
    assert text == (
        "Forgetting: full lost 16.7 % of the base model's MMLU accuracy of 60.0 %; the gate is 5 % (1000 questions)."
    )
    assert [line[0] for line in forgetting_cells(table)] == ["base", "full", "lora"]
    assert [line[-1] for line in forgetting_cells(table)] == ["-", "forgot", "kept"]


def test_the_gate_is_at_five_percent_of_the_base_s_accuracy() -> None:
    table = rows(("base", 0.4), ("full", 0.379), ("lora", 0.381))  # 5.25 % and 4.75 % lost
    add_changes(table, answered(table))
    assert (table[1]["mmlu"]["forgot"], table[2]["mmlu"]["forgot"]) == (True, False)


def test_nothing_is_said_without_a_base_or_without_mmlu() -> None:
    for table in (rows(("full", 0.5)), rows(("base", None), ("full", 0.5)), rows(("base", 0.5), ("full", None))):
        add_changes(table, answered(table))
        assert forgetting_verdict(table) is None
    assert forgetting_cells(rows(("base", None))) == []
    assert forgetting_verdict([{"method": "base"}]) is None  # a table from before MMLU was scored
    table = rows(("base", 0.0), ("full", 0.5))
    add_changes(table, answered(table))
    assert (table[1]["mmlu"]["lost_percent"], table[1]["mmlu"]["forgot"]) == (None, False)


def test_a_base_at_chance_and_a_loss_within_the_noise_are_told() -> None:
    table = rows(("base", 0.26), ("full", 0.24), questions=100)
    add_changes(table, answered(table) | {"full": [number >= 76 for number in range(100)]})
    text = str(forgetting_verdict(table))
    assert "For full the 95 % interval includes no change" in text
    assert "not answer better than chance" in text
    table = rows(("base", 0.6), ("full", 0.6))
    add_changes(table, answered(table))
    assert "none lost more than 5 %" in str(forgetting_verdict(table))
    assert "chance" not in str(forgetting_verdict(table))


def test_the_interval_is_that_of_resampled_questions() -> None:
    generator = np.random.default_rng(3)
    before = generator.random(300) < 0.6
    after = before ^ (generator.random(300) < 0.15)
    picks = np.random.default_rng(4).integers(0, 300, size=(20_000, 300))
    drawn = 100 * (after[picks].mean(1) - before[picks].mean(1))
    expected = np.percentile(drawn, [2.5, 97.5])
    assert change_interval(list(after), list(before)) == pytest.approx(list(expected), abs=0.35)
    assert change_interval(list(before), list(before)) == [0.0, 0.0]  # paired: identical answers have no spread
