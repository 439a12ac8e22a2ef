"""Human-readable numbers, and the cells of the comparison, for both terminal and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "-"

#: Column titles, on two lines where that keeps the table within 80 characters.
HEADERS = (
    "model",
    "trainable\nparams",
    "peak\nGiB",
    "s/step",
    "tok/s",
    "eval\nloss",
    "task\nscore",
    "of full\n(95 %)",
    "saved\nMB",
)


#: Effectiveness (percent of full fine-tuning's score) from which a method counts as close to it.
CLOSE = 95


def amount(count: float | None) -> str:
    """1,234 as 1.2 K, 134,515,008 as 134.5 M."""
    if count is None:
        return ABSENT
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def gigabytes(size: float | None) -> str:
    """Bytes as GiB with two digits."""
    return ABSENT if size is None else f"{size / 2**30:.2f} GiB"


def percent(value: float | None) -> str:
    """0.915 as 91.5 %."""
    return ABSENT if value is None else f"{100 * value:.1f} %"


def interval(bounds: Sequence[float] | None) -> str:
    """A 95 % interval of percentages, as 93-97."""
    return ABSENT if bounds is None else f"{bounds[0]:.0f}-{bounds[1]:.0f}"


#: What a plan promises: its key in score.json, its title, the divisor, the format.
_PROMISES = (
    ("peak_memory_bytes", "GiB at peak", 2**30, ".2f"),
    ("seconds_per_step", "s/step", 1, ".2f"),
    ("hours", "minutes of training", 1 / 60, ".1f"),
)

PROMISE_HEADERS = (
    "run",
    *(f"{title}\n{column}" for _, title, _, _ in _PROMISES for column in ("promised", "measured", "error")),
)


def promise_cells(name: str, score: Mapping[str, Any]) -> list[str]:
    """A run's promises and measurements, in the order of `PROMISE_HEADERS`; errors are relative to the measurement."""
    cells = [name]
    for key, _, unit, form in _PROMISES:
        pair = score[key]
        error = pair["error_percent"]
        cells += [format(pair[side] / unit, form) for side in ("promised", "measured")]
        cells.append(ABSENT if error is None else f"{error:+.0f} %")
    return cells


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's cells as text, one list per model in the order of `HEADERS`."""
    result = []
    for row in rows:
        # percent of the full fine-tune's score, with the bounds of its interval
        effect = ABSENT if row["effectiveness"] is None else f"{row['effectiveness']:.1f}"
        if row["effectiveness_interval"] is not None and row["method"] != "full":
            effect += f" ({interval(row['effectiveness_interval'])})"
        peak, size = row["peak_memory_bytes"], row["checkpoint_bytes"]
        result.append(
            [
                row["model"],
                amount(row["trainable_parameters"]),
                _number(None if peak is None else peak / 2**30, ".2f"),
                _number(row["seconds_per_step"], ".2f"),
                _number(row["tokens_per_second"], ".0f"),
                _number(row["eval_loss"], ".3f"),
                percent(row["task_score"]),
                effect,
                _number(None if size is None else size / 1e6, ".1f"),
            ]
        )
    return result


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which model scored best, or which are tied (the interval includes equality), and the cost of the cheapest good one."""
    tuned = [row for row in rows if row["method"] != "base"]
    best = max(tuned, key=lambda row: row["task_score"])
    base = next((row for row in rows if row["method"] == "base"), None)
    if base is not None and best["task_score"] <= base["task_score"]:
        return f"No method beats the base model's {percent(base['task_score'])} of the task: train longer, or on more rows."
    if base is not None and _tied(base):
        return (
            f"The test rows do not distinguish {best['model']} ({percent(best['task_score'])} of the task) from the base model "
            f"({percent(base['task_score'])}): test on more rows, or train longer."
        )
    if base is None and best["task_score"] <= 0:
        return "No model scored above 0 % of the task: train longer, or on more rows."
    tied = [row for row in tuned if row is best or _tied(row)]
    against = "" if base is None else f" against {percent(base['task_score'])} for the base model"
    if len(tied) > 1:
        scores = ", ".join(f"{row['model']} {percent(row['task_score'])}" for row in tied)
        return f"A tie: {scores} of the task{against}, and the test rows do not distinguish them. {_cheapest(tied)}."
    sentence = f"{best['model']} scored best: {percent(best['task_score'])} of the task{against}"
    close = [row for row in tuned if row["method"] != "full" and (row["effectiveness"] or 0) >= CLOSE]
    if close and close != [best]:
        lean = min(close, key=lambda row: row["peak_memory_bytes"])
        sentence += (
            f". {lean['model']} reaches {lean['effectiveness']:.1f} % of full fine-tuning's score "
            f"(95 % interval {interval(lean['effectiveness_interval'])}) with {_share(lean)}"
        )
    return sentence + "."


def _tied(row: Mapping[str, Any]) -> bool:
    """Whether a score may equal the best one, judged by the 95 % interval."""
    bounds = row["of_best_interval"]
    return bounds is not None and bounds[0] <= 100 <= bounds[1]


def _cheapest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which of the models took the least memory, and which the least time."""
    lean = min(rows, key=lambda row: row["peak_memory_bytes"])
    fast = min(rows, key=lambda row: row["train_seconds"])
    if lean["train_seconds"] <= fast["train_seconds"]:
        return f"{lean['model']} is the cheapest of them: {_share(lean)}, {_minutes(lean)}"
    least = f"{lean['model']} took the least memory ({_share(lean)}, {_minutes(lean)})"
    return f"{least}, {fast['model']} the least time ({_minutes(fast)})"


def _minutes(row: Mapping[str, Any]) -> str:
    return f"{row['train_seconds'] / 60:.1f} minutes of training"


def _share(row: Mapping[str, Any]) -> str:
    return f"{amount(row['trainable_parameters'])} trainable parameters, {gigabytes(row['peak_memory_bytes'])} at peak"
