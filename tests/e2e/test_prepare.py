"""The data stage as a whole: every input row is accounted for, for any input and any number of reader processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import COLOURS, chat_row
from tests.support.hostile import HOSTILE, forged_turns
from tests.support.prepared import WORDS, balanced, question, read_arrow, rows_of
from tunesmith.chat.named import named_template
from tunesmith.errors import DataError, RecipeError
from tunesmith.io.rows import Row
from tunesmith.recipe import NAMED_TEMPLATES, DataSection, ResolvedRecipe, dump_recipe, parse_recipe
from tunesmith.runs import create_run, read_jsonl
from tunesmith.runs.decisions import Decisions, row_digest
from tunesmith.stages.prepare import prepare
from tunesmith.stages.prepare.mixture import shares, targets
from tunesmith.stages.prepare.work import Settings, Worker


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Callable[[str], ResolvedRecipe]:
    def make(data: str) -> ResolvedRecipe:
        own = "" if "heldout:" in data else "heldout: 0.1, "
        return parse_recipe(f"model: {tiny_model}\ndata: {{{own}{data}}}\n", "recipe.yaml", tmp_path)

    return make


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    rows = rows_of(1300)
    write_rows([*rows, *rows[:20], *({**chat_row(question(i), "yes then"), "n": i} for i in range(40))])
    runs = []
    for workers in (1, 2):
        run = create_run(recipe(f"train: train.jsonl, workers: {workers}"), tmp_path / str(workers))
        ledger = prepare(run)
        assert balanced(ledger)
        assert ledger["reasons"]["duplicate"] == 20
        assert ledger["findings"]["conflicting-answers"]["warn"] == 40
        runs.append({path.name: path.read_bytes() for path in (run.path / "data").iterdir()})
    assert runs[0].keys() == runs[1].keys()
    assert [name for name in runs[0] if runs[0][name] != runs[1][name]] == []
    assert "intermediate.arrow" not in runs[0]


def test_findings_are_told_without_content_and_counted(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    rows = rows_of(60)
    rows[3] = chat_row("What is asked here again and again by all?", "What is asked here again and again by all?")
    rows[7] = chat_row(question(7), "<div><p>The answer is 7 and some more</p></div>")
    rows[9] = chat_row(question(8), f"{COLOURS[0]} {WORDS[40 % 12]} 8 ")  # row 8 except for a blank
    write_rows(rows)
    run = create_run(recipe("train: train.jsonl, max_rows: 50"), tmp_path / "run")
    ledger = prepare(run)
    assert balanced(ledger)
    assert ledger["reasons"]["answer-repeats-prompt"] == 1
    assert ledger["reasons"]["duplicate"] == 1
    assert ledger["rows_train"] + ledger["rows_heldout"] == 50
    findings = read_jsonl(run.path / "data" / "findings.jsonl")
    assert all(finding.keys() == {"where", "rule", "action", "detail"} for finding in findings)
    assert ("answer-repeats-prompt", "reject") in {(finding["rule"], finding["action"]) for finding in findings}
    counted = sum(sum(actions.values()) for actions in ledger["findings"].values())
    assert counted == len(findings) > 0
    assert len(read_jsonl(run.path / "data" / "rejects.jsonl")) == ledger["rows_rejected"]


def test_near_duplicates_and_leaks_are_left_out(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    long = "The harbour opens at six and the boats leave for the island with bread, letters, lamp oil and two goats a week"
    rows = [*rows_of(40), chat_row("When?", long), chat_row("When?", f"{long} now"), *rows_of(3, 100)]
    write_rows([*rows, chat_row(question(200), "one thing"), chat_row(question(100), "asked in the test")])
    write_rows([*rows_of(2, 100), chat_row(question(200), "another thing")], "test.jsonl")
    ledger = prepare(create_run(recipe("train: train.jsonl, test: test.jsonl"), tmp_path / "run"))
    assert balanced(ledger)
    assert ledger["reasons"] == {"leaks-test": 4, "near-duplicate": 1}
    assert ledger["test"]["rows_test"] == 3


def test_train_rows_that_ask_what_is_held_out_are_left_out(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    write_rows([chat_row(question(i // 2), f"{WORDS[i % 12]} {i} {COLOURS[i % 8]}") for i in range(80)])
    run = create_run(recipe("train: train.jsonl, duplicates: {threshold: null}"), tmp_path / "run")
    ledger = prepare(run)
    assert balanced(ledger)
    assert ledger["reasons"]["leaks-heldout"] > 0
    rows = {row["where"]: row for row in read_arrow(run.path / "data" / "train.arrow")}
    asked = {(int(where.rpartition(":")[2]) - 1) // 2 for where in rows}
    held = {(int(row["where"].rpartition(":")[2]) - 1) // 2 for row in read_jsonl(run.path / "data" / "heldout.jsonl")}
    assert not asked & held


def test_several_sources_are_mixed_by_weight(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    write_rows(rows_of(60), "a.jsonl")
    pairs = [{"q": question(i), "a": f"{WORDS[i % 12]} {i}"} for i in range(300, 400)]
    write_rows(pairs, "b.jsonl")
    text = (
        "sources: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1, columns: {prompt: q, completion: a}}],"
        " duplicates: {threshold: null}"
    )
    run = create_run(recipe(text), tmp_path / "run")
    ledger = prepare(run)
    assert balanced(ledger)
    kept = [source["rows_train"] + source["rows_heldout"] for source in ledger["sources"]]
    assert kept == [60, 20]
    assert (ledger["reasons"], ledger["unused"]) == ({}, {"over-mixture": 80})
    assert ledger["formats"] == {"messages": 60, "prompt": 100}
    before = (run.path / "data" / "train.arrow").read_bytes()
    again = create_run(recipe(text), tmp_path / "again")
    prepare(again)
    assert (again.path / "data" / "train.arrow").read_bytes() == before
    assert create_run(recipe(text), tmp_path / "run").is_current("prepare", run.status()["stages"]["prepare"]["inputs"])


def test_temperature_brings_small_sources_up() -> None:
    data = {"train": "", "sources": [{"path": "a"}, {"path": "b"}]}
    by_size = shares([900, 100], DataSection.model_validate({**data, "temperature": 1}))
    warm = shares([900, 100], DataSection.model_validate({**data, "temperature": 2}))
    assert by_size == [0.9, 0.1]
    assert warm == [0.75, 0.25]
    assert targets([900, 100], [0.75, 0.25]) == [300, 100]
    assert shares([900, 100], DataSection.model_validate(data)) is None


def _long_row(rounds: int) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Short."}]
    for i in range(rounds):
        turns += [{"role": "user", "content": question(i)}, {"role": "assistant", "content": f"{WORDS[i % 12]} {i}"}]
    return {"messages": turns}


@pytest.mark.parametrize(("overlong", "decision"), [("reject", "rejected"), ("truncate", "turns-dropped"), ("split", "split")])
def test_overlong_rows(tmp_path: Path, recipe: Any, write_rows: Any, overlong: str, decision: str) -> None:
    write_rows([*rows_of(10), _long_row(12), chat_row(question(77) * 30, "no")])
    run = create_run(recipe(f"train: train.jsonl, heldout: 0, max_length: 128, overlong: {overlong}"), tmp_path / "run")
    ledger = prepare(run)
    assert balanced(ledger)
    assert ledger["overlong"] == ({"rejected": 2} if overlong == "reject" else {"rejected": 1, decision: 1})
    rows = [row for row in read_arrow(run.path / "data" / "train.arrow") if ":11" in row["where"]]
    assert all(row["length"] <= 128 for row in rows)
    texts = [question(i) for i in range(12)]
    samples = (run.path / "data" / "samples.txt").read_text(encoding="utf-8")
    found = [text for text in texts if text in samples.partition(":11")[2]]
    assert found == {"reject": [], "truncate": texts[: len(found)], "split": texts}[overlong]
    assert len(rows) == {"reject": 0, "truncate": 1}.get(overlong, ledger["rows_added"] + 1)
    assert sum(ledger["lengths"]["histogram"].values()) == 12


def test_an_answer_is_cut_only_where_that_is_asked(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    write_rows([*rows_of(10), chat_row(question(77), "no end of it " * 60)])
    text = "train: train.jsonl, heldout: 0, max_length: 128, overlong: truncate"
    ledger = prepare(create_run(recipe(text), tmp_path / "kept"))
    assert ledger["overlong"] == {"rejected": 1}
    run = create_run(recipe(f"{text}, truncate_answers: true"), tmp_path / "cut")
    assert prepare(run)["overlong"] == {"answer-cut": 1}
    assert max(row["length"] for row in read_arrow(run.path / "data" / "train.arrow")) == 128


def test_balance_by_an_expression(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    write_rows([chat_row(question(i), json.dumps({"kind": "rare" if i % 10 == 0 else "common"})) for i in range(60)])
    ledger = prepare(create_run(recipe("train: train.jsonl, balance: {label: answer_json.kind, cap: 12}"), tmp_path / "run"))
    assert balanced(ledger)
    assert ledger["balance"] == {"common": {"before": 54, "after": 12}, "rare": {"before": 6, "after": 6}}
    assert ledger["unused"]["balanced-out"] == 42


def test_a_review_reaches_the_next_preparation(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    rows = rows_of(10)
    write_rows(rows)
    prepare(create_run(recipe("train: train.jsonl"), tmp_path / "run"))
    edited = chat_row("Asked anew by hand?", "Answered by hand.")
    made = [{"row": row_digest(rows[2]), "verdict": "reject"}, {"row": row_digest(rows[4]), "verdict": "edit", "value": edited}]
    write_rows(made, "review.jsonl")
    run = create_run(recipe("train: train.jsonl"), tmp_path / "run")
    assert prepare(run)["reasons"] == {"reviewed": 1}
    assert "Answered by hand." in (run.path / "data" / "samples.txt").read_text(encoding="utf-8")


def test_the_page_shows_everything_and_runs_nothing(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    write_rows(
        [chat_row(f"{question(i)} <script>alert({i})</script> & so on", f"<b>{WORDS[i % 12]}</b> {i}") for i in range(12)]
    )
    run = create_run(recipe("train: train.jsonl, chat_template: llama3"), tmp_path / "run")
    ledger = prepare(run)
    page = (run.path / "data" / "report.html").read_text(encoding="utf-8")
    assert "<mark>" in page
    assert not re.search(r"""<script|<b>amber|(src|href)\s*=""", page)
    rules = {finding["rule"] for finding in ledger["template"]["findings"]}
    assert "template-token-mismatch" in rules
    for shown in ("template-token-mismatch", "held out", "Length in tokens", ledger["template"]["digest"]):
        assert shown in page


@pytest.fixture(scope="session")
def workers(tiny_model: Path) -> list[Worker]:
    data = DataSection(train="rows.jsonl")
    sources = [None, *(named_template(name) for name in NAMED_TEMPLATES)]
    return [Worker(Settings(data, "conversation", tiny_model, source, frozenset(), Decisions())) for source in sources]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(HOSTILE, min_size=1, max_size=4), st.data())
def test_hostile_rows_are_never_lost_and_forge_no_turn(workers: list[Worker], rows: list[dict[str, Any]], data: Any) -> None:
    worker = data.draw(st.sampled_from(workers))
    chunk = worker([(0, Row(f"f:{number}", row)) for number, row in enumerate(rows, start=1)])
    out = len(chunk.problems) + len(chunk.rejections) + len(chunk.made)
    assert chunk.rows_in.total() + chunk.rows_added == out == len(rows)
    assert forged_turns(worker, chunk) == 0


def test_weights_for_some_sources_alone_are_refused(recipe: Any) -> None:
    for text in ("sources: [{path: a, weight: 1}, {path: b}]", "train: a, sources: [{path: b}]", "train: a, temperature: 2"):
        with pytest.raises(Exception, match="TS003"):
            recipe(text)


def test_sources_survive_the_run_folder_and_know_their_keys(tmp_path: Path, recipe: Any) -> None:
    made = recipe("sources: [{path: a.csv, columns: {prompt: q, completion: a}}, {path: 'hub:owner/name', split: test}]")
    assert parse_recipe(dump_recipe(made), "recipe.yaml", Path("/")).recipe == made.recipe
    assert [part.path for part in made.recipe.data.parts] == [str(tmp_path / "a.csv"), "hub:owner/name"]
    with pytest.raises(RecipeError, match=r"TS002.*sources\.0\.wieght"):
        recipe("sources: [{path: a, wieght: 1}]")


def test_real_tool_calls_are_trained(tmp_path: Path, recipe: Any, shared_data: Path) -> None:
    path = shared_data / "alpaca_demo" / "glaive_toolcall_en_demo.json"
    run = create_run(recipe(f"train: {path}, chat_template: qwen, max_rows: 40, max_length: 100000"), tmp_path / "run")
    ledger = prepare(run)
    assert balanced(ledger)
    assert (ledger["rows_in"], ledger["rows_train"] + ledger["rows_heldout"]) == (300, 40)
    assert "empty-answer" not in ledger["reasons"]
    assert "\u27e6<tool_call>" in (run.path / "data" / "samples.txt").read_text(encoding="utf-8").replace("\n", "")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gsm8k/test.jsonl", "columns: {prompt: question, completion: answer}"),
        ("alpaca_demo/alpaca_zh_demo.json", "on_bad_row: reject"),
        ("alpaca_demo/identity.json", "on_bad_row: reject"),
    ],
)
def test_real_sets_load_by_one_recipe(tmp_path: Path, recipe: Any, shared_data: Path, name: str, more: str) -> None:
    ledger = prepare(create_run(recipe(f"train: {shared_data / name}, max_rows: 50, {more}"), tmp_path / "run"))
    assert balanced(ledger)
    assert ledger["rows_train"] + ledger["rows_heldout"] == 50


def test_a_missing_file_is_readable(tmp_path: Path, recipe: Any) -> None:
    with pytest.raises(DataError, match="TS101"):
        prepare(create_run(recipe("train: none.csv"), tmp_path / "run"))
    assert not (tmp_path / "run" / "data").exists()
