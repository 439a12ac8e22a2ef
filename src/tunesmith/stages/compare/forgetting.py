"""What tuning made a model forget: each method's MMLU accuracy against the base model's, on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.stages.compare.text import ABSENT, percent

#: A method that loses more than this percentage of the base model's MMLU accuracy counts as having forgotten.
GATE_PERCENT = 5.0
CHANCE = 0.25  # four choices
BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 0

FORGETTING_HEADERS = ("model", "MMLU", "std. error", "change, points\n(95 %)", "lost of\nbase's", "gate of 5 %")


def add_changes(rows: Sequence[dict[str, Any]], answers: Mapping[str, Sequence[bool]]) -> None:
    """Fill in each row's change against the base model, where both have been scored on MMLU.

    `answers` has, by model, whether each question was answered correctly, in the same order for all. A row's `mmlu` gets
    `change_points`, its 95 % `change_interval`, `lost_percent` (of the base model's accuracy; negative for a gain, None if
    that accuracy is 0) and `forgot`: whether more than GATE_PERCENT is lost.
    """
    base = next((row for row in rows if row["method"] == "base" and row["mmlu"] is not None), None)
    if base is None:
        return
    before = base["mmlu"]["accuracy"]
    for row in rows:
        if row is base or row["mmlu"] is None:
            continue
        after = row["mmlu"]["accuracy"]
        lost = 100 * (before - after) / before if before > 0 else None
        row["mmlu"] |= {
            "change_points": 100 * (after - before),
            "change_interval": change_interval(answers[row["model"]], answers[base["model"]]),
            "lost_percent": lost,
            "forgot": lost is not None and lost > GATE_PERCENT,
        }


def change_interval(after: Sequence[bool], before: Sequence[bool]) -> list[float]:
    """95 % percentile interval of the change in points, by paired bootstrap over the questions.

    Only the numbers of gained, lost and unchanged questions in a resample matter. These counts are multinomial, so they are
    drawn directly: the same distribution without resampling questions (Efron and Tibshirani 1993, chapter 13).
    """
    import numpy as np

    count = len(before)
    pairs = list(zip(after, before, strict=True))
    gained, lost = sum(now and not then for now, then in pairs), sum(then and not now for now, then in pairs)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    shares = [gained / count, lost / count, (count - gained - lost) / count]
    draws = generator.multinomial(count, shares, size=BOOTSTRAP_DRAWS)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / count, [2.5, 97.5])
    return [float(low), float(high)]


def forgetting_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The forgetting table: a line per model that was scored on MMLU, in the order of FORGETTING_HEADERS."""
    lines = []
    for row in rows:
        mmlu = row.get("mmlu")
        if mmlu is None:
            continue
        line = [row["model"], percent(mmlu["accuracy"]), percent(mmlu["standard_error"])]
        if "change_points" in mmlu:
            low, high = mmlu["change_interval"]
            lost = mmlu["lost_percent"]
            line += [f"{mmlu['change_points']:+.1f} ({low:+.1f} to {high:+.1f})", ABSENT if lost is None else f"{lost:.1f} %"]
            line.append("forgot" if mmlu["forgot"] else "kept")
        else:
            line += [ABSENT] * 3
        lines.append(line)
    return lines


def forgetting_verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Which methods lost more than the gate allows, and whether that is meaningful; None if there is no change to report."""
    changed = [row for row in rows if "change_points" in (row.get("mmlu") or {})]
    if not changed:
        return None
    base = next(row["mmlu"] for row in rows if row["method"] == "base")
    forgot = [row for row in changed if row["mmlu"]["forgot"]]
    if forgot:
        names = ", ".join(f"{row['model']} lost {row['mmlu']['lost_percent']:.1f} %" for row in forgot)
        sentence = f"Forgetting: {names} of the base model's MMLU accuracy of {percent(base['accuracy'])}; the gate is 5 %"
        unsure = [row["model"] for row in forgot if row["mmlu"]["change_interval"][1] >= 0]
        if unsure:
            sentence += f". For {', '.join(unsure)} the 95 % interval includes no change"
    else:
        sentence = f"Forgetting: none lost more than 5 % of the base model's MMLU accuracy of {percent(base['accuracy'])}"
    if base["accuracy"] - 1.96 * (base["standard_error"] or 0) <= CHANCE:
        sentence += ". The base model does not answer better than chance, so there was little to forget"
    return sentence + f" ({base['questions']} questions)."
