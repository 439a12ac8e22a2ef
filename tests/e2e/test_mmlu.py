"""MMLU through the stages, on the tiny model: scored, stored, compared, and skipped if not requested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.errors import RunError
from tunesmith.io.atomic import read_json
from tunesmith.pipeline import with_method
from tunesmith.runs import Run, create_run, eval_folder, read_jsonl
from tunesmith.stages.compare import compare
from tunesmith.stages.evaluate import evaluate
from tunesmith.stages.evaluate.stage import evaluate_base
from tunesmith.stages.export import export
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

QUIET = Console(quiet=True)


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    folder = tmp_path / "mmlu"
    for part, count in (("dev", 5), ("test", 12)):
        (folder / part).mkdir(parents=True)
        for subject in ("colours", "numbers"):
            rows = [f"Which of the {subject} is number {i}?,one,two,three,four,{'ABCD'[i % 4]}\n" for i in range(count)]
            (folder / part / f"{subject}_{part}.csv").write_text("".join(rows), encoding="utf-8")
    return folder


def prepared(make_recipe: Any, path: Path, method: str = "lora", **overrides: Any) -> Run:
    asked = {"train__max_steps": 1, "evaluate__max_new_tokens": 4, "evaluate__max_rows": 2, **overrides}
    run = create_run(with_method(make_recipe(**asked), method), path)
    prepare(run)
    return run


def test_results_samples_and_the_no_op(tmp_path: Path, make_recipe: Any, tiny_model: Path, mmlu: Path) -> None:
    run = prepared(make_recipe, tmp_path / "run", evaluate__mmlu="mmlu", evaluate__mmlu_questions=10)
    results = evaluate(run, tiny_model, QUIET)
    scored = results["mmlu"]
    assert set(scored["subjects"]) == {"colours", "numbers"}
    assert scored["questions"] == 20
    assert scored["subjects"]["colours"]["questions"] == 10
    assert scored["padded_because"] is None
    folder = run.path / eval_folder(results["model_digest"])
    samples = read_jsonl(folder / "mmlu.jsonl")
    assert len(samples) == 20
    assert scored["accuracy"] == sum(s["chosen"] == s["answer"] for s in samples) / 20
    for sample in samples:
        told = sample["log_likelihoods"]
        assert sample["chosen"] == "ABCD"[told.index(max(told))]
    assert [s["question"] for s in samples if s["subject"] == "numbers"] == list(range(10))

    before = (folder / "results.json").stat().st_mtime_ns
    assert evaluate(run, tiny_model, QUIET) == results
    assert (folder / "results.json").stat().st_mtime_ns == before
    with (mmlu / "test" / "colours_test.csv").open("a", encoding="utf-8") as handle:
        handle.write("New?,1,2,3,4,A\n")
    evaluate(run, tiny_model, QUIET)
    assert (folder / "results.json").stat().st_mtime_ns != before


def test_without_mmlu_nothing_is_told_of_it(tmp_path: Path, make_recipe: Any, tiny_model: Path) -> None:
    run = prepared(make_recipe, tmp_path / "run")
    results = evaluate(run, tiny_model, QUIET)
    assert list(results) == [
        *("model", "model_digest", "suite", "rows", "rows_digest", "task_score", "json_parse_rate", "schema_valid_rate"),
        *("field_accuracy", "macro_f1", "eval_loss", "unfinished_answers", "generated_tokens", "generate_seconds"),
        *("generated_tokens_per_second", "compute_dtype"),
    ]
    assert not (run.path / eval_folder(results["model_digest"]) / "mmlu.jsonl").exists()


def test_cut_prompts_are_an_event(tmp_path: Path, make_recipe: Any, tiny_model: Path, mmlu: Path) -> None:
    short = tmp_path / "short"
    short.mkdir()
    for path in tiny_model.iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}), encoding="utf-8")
    run = prepared(make_recipe, tmp_path / "run", evaluate__mmlu="mmlu")
    results = evaluate(run, short, QUIET)
    assert results["mmlu"]["cut_prompts"] == 24
    (event,) = run.events(eval_folder(results["model_digest"]))
    assert (event["code"], event["count"]) == ("mmlu-prompts-cut", 24)


def test_comparison_shows_what_was_forgotten(tmp_path: Path, make_recipe: Any, mmlu: Path) -> None:
    runs = []
    for method in ("full", "lora"):
        run = prepared(make_recipe, tmp_path / method, method, evaluate__mmlu="mmlu", train__learning_rate=0.01)
        train(run, QUIET)
        export(run)
        evaluate(run, console=QUIET)
        runs.append(run)
    base = evaluate_base(runs[0], QUIET)["mmlu"]
    table = compare(runs, tmp_path / "compare")
    assert table["rows"][0]["mmlu"]["accuracy"] == base["accuracy"]
    for row in table["rows"][1:]:
        facts = row["mmlu"]
        assert facts["change_points"] == pytest.approx(100 * (facts["accuracy"] - base["accuracy"]))
        low, high = facts["change_interval"]
        assert low <= facts["change_points"] <= high
        assert "mmlu_answers" not in row
    assert read_json(tmp_path / "compare" / "compare.json") == table
    page = (tmp_path / "compare" / "report.html").read_text(encoding="utf-8")
    assert "What was forgotten: MMLU" in page

    other = prepared(
        make_recipe, tmp_path / "lora", "lora", evaluate__mmlu="mmlu", evaluate__mmlu_questions=3, train__learning_rate=0.01
    )
    evaluate(other, console=QUIET)
    with pytest.raises(RunError, match="different MMLU questions"):
        compare([runs[0], other], tmp_path / "compare")
