"""The compare stage: the usual table, measured on your data, one row per model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem, RunError
from tunesmith.io.atomic import check_replaceable, commit_folder, read_json, sha256_json, write_json, write_text
from tunesmith.models.load import locate, model_digest
from tunesmith.runs import Run, eval_folder, installed_versions, read_jsonl
from tunesmith.stages.compare.forgetting import add_changes

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 0

COMPARISON = "comparison"  # the kind that its folder is committed as
_SCORED_BY = {"task", "json_schema", "label", "max_new_tokens"}  # keys of `evaluate` that decide an answer's score
_PER_ROW = ("scores", "mmlu_answers")  # inputs of the table that are not stored in it


def compare(runs: Sequence[Run], target: Path) -> dict[str, Any]:
    """Write `target`/compare.json and report.html and return the table.

    `rows` begins with the base model, then one row per run. *Effectiveness* is a model's task score divided by that of
    full fine-tuning, in percent, with a 95 % interval by paired bootstrap over the test rows; it is null if no run
    is a full fine-tune. `of_best_interval` is the same against the best score of a trained model. `mmlu` has a model's
    accuracy and how much of the base model's accuracy it lost; null if it was not scored.
    Raises RunError if a run is not evaluated, the runs were scored on different rows or questions, or `target` holds
    something else.
    """
    check_replaceable(target, COMPARISON)
    _check_different(runs)
    evaluated = [_evaluated(run) for run in runs]
    base = _base_results(runs)
    _check_same_rows(runs, [*evaluated, *([] if base is None else [base])])
    rows = [] if base is None else [_row("base", None, None, base)]
    rows += [_run_row(run, results) for run, results in zip(runs, evaluated, strict=True)]
    _add_effectiveness(rows)
    _add_ties(rows)
    add_changes(rows, {row["model"]: row["mmlu_answers"] for row in rows})
    curves = [read_jsonl(run.path / "train" / "metrics.jsonl") for run in runs]
    table = {
        "rows": [{key: value for key, value in row.items() if key not in _PER_ROW} for row in rows],
        "task": _task_facts(runs[0], evaluated[0]),
        "hardware": _settings(runs[0])["hardware"],
        "versions": installed_versions(),
        "runs": [run.path.name for run in runs],
    }
    from tunesmith.stages.compare.report import render

    page = render(table, {row["model"]: curve for row, curve in zip(rows[-len(runs) :], curves, strict=True)}, _details(runs))
    with commit_folder(target, COMPARISON) as folder:
        write_json(folder / "compare.json", table)
        write_text(folder / "report.html", page)
    return table


def _check_different(runs: Sequence[Run]) -> None:
    seen: dict[Path, Run] = {}
    for run in runs:
        if seen.setdefault(run.path.resolve(), run) is not run:
            why, fix = "comparing a run with itself says nothing", "list each run once"
            raise RunError(Problem("TS602", "the run is listed twice", str(run.path), why, fix))


def _results(run: Run, digest: str) -> dict[str, Any] | None:
    """The run's evaluation of the model with this digest; None if there is none.

    Adds each row's score as `scores`, and whether each MMLU question was answered correctly as `mmlu_answers`.
    """
    stage = eval_folder(digest)
    if run.status()["stages"].get(stage, {}).get("status") != "done":
        return None
    results: dict[str, Any] = read_json(run.path / stage / "results.json")
    results["scores"] = [sample["score"] for sample in read_jsonl(run.path / stage / "samples.jsonl")]
    questions = read_jsonl(run.path / stage / "mmlu.jsonl")
    results["mmlu_answers"] = [question["chosen"] == question["answer"] for question in questions]
    return results


def _evaluated(run: Run) -> dict[str, Any]:
    """The evaluation of the run's current export."""
    results = _results(run, model_digest(run.path / "export" / run.recipe.export.name))
    if results is None:
        fix = f"run `tunesmith evaluate {run.path}` first"
        why = "there is no score to compare"
        raise RunError(Problem("TS011", "the run's export is not evaluated", str(run.path), why, fix))
    return results


def _base_results(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The evaluation of the untuned base model, from the first run that has one; None if the runs' base models differ."""
    folders = {locate(run.recipe.model, run.recipe.revision) for run in runs}
    digests = {model_digest(folder) for folder in folders}
    if len(digests) > 1:
        return None
    (digest,) = digests
    return next((results for run in runs if (results := _results(run, digest)) is not None), None)


def _check_same_rows(runs: Sequence[Run], evaluated: Sequence[dict[str, Any]]) -> None:
    ways = (run.recipe.evaluate.model_dump(mode="json", include=_SCORED_BY) for run in runs)
    mmlu = (results["mmlu"] for results in evaluated if results.get("mmlu"))
    for found, how, why, fix in (
        (
            {results["rows_digest"] for results in evaluated},
            "on different test rows",
            "scores on different rows say nothing about the methods",
            "data.test and evaluate section",
        ),
        (
            {sha256_json(way) for way in ways},
            "in different ways",
            "the same answer would get different scores",
            ", ".join(f"evaluate.{name}" for name in sorted(_SCORED_BY)),
        ),
        (
            {(each["questions_digest"], each["shots"]) for each in mmlu},
            "on different MMLU questions",
            "forgetting only shows on the same questions",
            "evaluate.mmlu, mmlu_subjects, mmlu_questions and mmlu_shots",
        ),
    ):
        if len(found) > 1:
            where = ", ".join(run.path.name for run in runs)
            raise RunError(Problem("TS601", f"the runs were scored {how}", where, why, f"give the runs the same {fix}"))


def _settings(run: Run) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(run.path / "train" / "settings.json")
    return settings


def _row(model: str, method: str | None, summary: dict[str, Any] | None, results: dict[str, Any]) -> dict[str, Any]:
    trained = summary or {}
    return {
        "model": model,
        "method": method or model,
        "trainable_parameters": trained.get("trainable_parameters"),
        "peak_memory_bytes": trained.get("peak_memory_bytes"),
        "seconds_per_step": trained.get("seconds_per_step"),
        "tokens_per_second": trained.get("tokens_per_second"),
        "train_seconds": trained.get("seconds"),
        "checkpoint_bytes": trained.get("checkpoint_bytes"),
        "eval_loss": results["eval_loss"],
        "task_score": results["task_score"],
        "json_parse_rate": results.get("json_parse_rate"),
        "schema_valid_rate": results.get("schema_valid_rate"),
        "field_accuracy": results.get("field_accuracy"),
        "macro_f1": results.get("macro_f1"),
        "effectiveness": None,
        "effectiveness_interval": None,
        "of_best_interval": None,
        "mmlu": _mmlu(results),
        "scores": results["scores"],
        "mmlu_answers": results["mmlu_answers"],
    }


def _mmlu(results: dict[str, Any]) -> dict[str, Any] | None:
    """The table's entry about a model's MMLU; the run's results.json has it by subject."""
    scored = results.get("mmlu")
    return None if scored is None else {key: scored[key] for key in ("accuracy", "standard_error", "questions", "shots")}


def _run_row(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    return _row(run.path.name, run.recipe.method, read_json(run.path / "train" / "summary.json"), results)


def _add_effectiveness(rows: list[dict[str, Any]]) -> None:
    """Fill in `effectiveness` and its interval against the first full fine-tune, if its score is above 0."""
    full = next((row for row in rows if row["method"] == "full"), None)
    if full is None or full["task_score"] <= 0:
        return
    for row in rows:
        row["effectiveness"] = 100 * row["task_score"] / full["task_score"]
        row["effectiveness_interval"] = bootstrap_ratio(row["scores"], full["scores"])


def _add_ties(rows: list[dict[str, Any]]) -> None:
    """Fill in `of_best_interval`: each score against the best trained model's, if that is above 0."""
    best = max((row for row in rows if row["method"] != "base"), key=lambda row: float(row["task_score"]))
    if best["task_score"] > 0:
        for row in rows:
            row["of_best_interval"] = bootstrap_ratio(row["scores"], best["scores"])


def bootstrap_ratio(scores: Sequence[float], reference: Sequence[float]) -> list[float]:
    """95 % percentile interval of 100 x mean(scores) / mean(reference), both resampled over the same rows.

    Paired, since both models answered the same questions (Efron and Tibshirani 1993, chapter 13). Draws whose
    reference mean is 0 are excluded.
    """
    import numpy as np

    left, right = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    picks = generator.integers(0, len(left), size=(BOOTSTRAP_DRAWS, len(left)))
    tops, bottoms = left[picks].mean(axis=1), right[picks].mean(axis=1)
    usable = bottoms > 0
    low, high = np.percentile(100 * tops[usable] / bottoms[usable], [2.5, 97.5])
    return [float(low), float(high)]


def _task_facts(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    ledger = read_json(run.path / "data" / "ledger.json")
    keys = ("rows_in", "rows_train", "rows_heldout", "rows_unused", "unused", "rows_rejected", "reasons")
    return {"base_model": Path(run.recipe.model).name, "test_rows": results["rows"], **{key: ledger[key] for key in keys}}


def _details(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run: its resolved settings with reasons, its export's proof, its recorded events, its plan's score."""
    details = []
    for run in runs:
        proof = run.path / "export" / run.recipe.export.name / "proof.json"
        score = run.path / "score" / "score.json"
        details.append(
            {
                "name": run.path.name,
                "settings": _settings(run),
                "proof": read_json(proof) if proof.is_file() else None,
                "score": read_json(score) if score.is_file() else None,
                "events": [*run.events("data"), *run.events("train")],
            }
        )
    return details
