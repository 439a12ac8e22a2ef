"""The data stage for objectives other than SFT: documents, pairs, judged answers, prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import chat_row
from tests.support.prepared import WORDS, balanced, question, read_arrow, rows_of
from tunesmith.errors import RecipeError
from tunesmith.recipe import OBJECTIVES, ResolvedRecipe, dump_recipe, parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.runs.decisions import row_digest
from tunesmith.stages.prepare import prepare
from tunesmith.stages.review import Review
from tunesmith.stages.review.terminal import review

SECRET = "AKIA" + "IOSFODNN7EXAMPLE"  # a key of a known format, from its vendor's documentation


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Callable[..., ResolvedRecipe]:
    def make(objective: str, data: str, more: str = "") -> ResolvedRecipe:
        if OBJECTIVES[objective].sampled:
            more += f"\n{objective}: {{reward_funcs: [valid-json]}}"
        text = f"model: {tiny_model}\nobjective: {objective}\ndata: {{{data}}}\n{more}\n"
        return parse_recipe(text, "recipe.yaml", tmp_path)

    return make


def text(number: int, sentences: int) -> str:
    return " ".join(question(number * 100 + i) for i in range(sentences))


def prepared(resolved: ResolvedRecipe, folder: Path) -> tuple[Run, dict[str, Any]]:
    run = create_run(resolved, folder)
    ledger = prepare(run)
    assert balanced(ledger)
    return run, ledger


def test_documents_in_pieces_share_their_documents_fate(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    texts = [text(i, 1 + i % 9) for i in range(60)]
    more = [texts[8], f"{texts[17]} now", f"{texts[3]} The key is {SECRET}.", texts[26], text(99, 3)]
    write_rows([{"body": each, "n": i} for i, each in enumerate([*texts, *more])])
    write_rows([{"body": text(99, 3)}, {"body": text(98, 8)}], "test.jsonl")
    asked = "train: train.jsonl, test: test.jsonl, columns: {text: body}, heldout: 0.2, max_length: 32, max_rows: 50"
    runs = []
    for workers in (1, 2):
        run, ledger = prepared(recipe("pretrain", f"{asked}, workers: {workers}"), tmp_path / str(workers))
        runs.append({path.name: path.read_bytes() for path in (run.path / "data").iterdir()})
    assert runs[0] == runs[1]
    assert ledger["reasons"] == {"duplicate": 2, "leaks-test": 1, "near-duplicate": 1, "secret": 1}
    assert (ledger["unused"], ledger["rows_unused"]) == ({"over-max-rows": 10}, 10)
    unused = [row["reason"] for row in read_jsonl(run.path / "data" / "unused.jsonl")]
    assert unused == ["over-max-rows"] * 10
    assert (ledger["rows_train"], ledger["rows_heldout"], ledger["formats"]) == (40, 10, {"text": 65})
    assert ledger["notes"].keys() == {"document-split"}
    train, heldout = (read_arrow(run.path / "data" / f"{name}.arrow") for name in ("train", "heldout"))
    assert ledger["pieces"] == {"train": len(train), "heldout": len(heldout)}
    assert ledger["tokens_trained_on"] == sum(sum(row["loss_mask"]) for row in train)
    assert max(row["length"] for row in train) <= 32
    origins = [{row["where"].partition(" (")[0] for row in rows} for rows in (train, heldout)]
    assert [len(each) for each in origins] == [40, 10]
    assert not origins[0] & origins[1]
    kept = read_jsonl(run.path / "data" / "heldout.jsonl")
    assert {row["where"] for row in kept} == origins[1]
    assert all(row.keys() == {"where", "text"} for row in kept)
    rejects = {row["reason"]: row["detail"] for row in read_jsonl(run.path / "data" / "rejects.jsonl")}
    assert rejects["duplicate"].startswith("the same text as ")
    assert ledger["test"]["rows_test"] == 2
    assert len(read_arrow(run.path / "data" / "test.arrow")) > 2
    assert not {"chat_template.jinja", "template.json", "test.jsonl", "intermediate.arrow"} & runs[0].keys()
    assert "template" not in ledger
    assert "The chat template" not in (run.path / "data" / "report.html").read_text(encoding="utf-8")


def test_a_folder_of_documents_is_read_as_it_stands(tmp_path: Path, recipe: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    raw = "<p>caf\u00c3\u00a9</p>  \n\n\n\n\tno answer, no turn \ufb01"
    for i in range(6):
        (folder / f"{i}.md").write_text(f"{text(i, 2)} {raw}", encoding="utf-8")
    run, ledger = prepared(recipe("pretrain", "train: texts, heldout: 0"), tmp_path / "run")
    assert (ledger["rows_train"], ledger["findings"]) == (6, {})
    assert (run.path / "data" / "samples.txt").read_text(encoding="utf-8").count(raw) == 6
    (folder / "notes.py").write_text("no document", encoding="utf-8")
    before = run.status()["stages"]["prepare"]["inputs"]
    prepare(run)
    assert run.status()["stages"]["prepare"]["inputs"] == before
    (folder / "0.md").write_text("another text", encoding="utf-8")
    prepare(run)
    assert run.status()["stages"]["prepare"]["inputs"] != before
    assert len(Review(run).places) == 6


@pytest.mark.parametrize(
    ("objective", "data", "key"),
    [
        ("pretrain", "clean: {html: false}", "data.clean"),
        ("pretrain", "quality: {refusal: reject}", "data.quality.refusal"),
        ("pretrain", "format: alpaca", "data.format"),
        ("pretrain", "chat_template: chatml", "data.chat_template"),
        ("pretrain", "overlong: split", "data.overlong"),
        ("dpo", "overlong: split", "data.overlong"),
        ("kto", "overlong: truncate", "data.overlong"),
        ("grpo", "overlong: truncate", "data.overlong"),
    ],
)
def test_what_rows_of_an_objective_cannot_have_is_refused(recipe: Any, objective: str, data: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(objective, f"train: a.jsonl, {data}")
    assert [(problem.code, problem.what) for problem in caught.value.problems] == [
        ("TS005", f"{key} with objective: {objective}")
    ]


def test_what_concerns_texts_may_be_set_for_documents(recipe: Any) -> None:
    made = recipe("pretrain", "train: a.jsonl, quality: {near-duplicate: warn}, screening: {email: reject}, columns: {text: b}")
    assert parse_recipe(dump_recipe(made), "recipe.yaml", Path("/")).recipe == made.recipe


def test_judged_answers_keep_their_labels_and_bad_ones_are_not_held_against_the_row(
    tmp_path: Path, recipe: Any, write_rows: Any
) -> None:
    rows = []
    for i in range(20):
        good = f"{WORDS[i % 12]} and {WORDS[i * 5 % 12]} {i}"
        rows.append({"prompt": question(i), "completion": good, "label": True})
        rows.append({"prompt": question(i), "completion": f"{good} no", "label": False})
    rows.append({"prompt": question(30), "completion": "I'm sorry, but I cannot help with that.", "label": False})
    rows.append({"prompt": question(31), "completion": "I'm sorry, but I cannot help with that.", "label": True})
    rows.append({"prompt": question(32), "completion": f"Take {SECRET}.", "label": False})
    rows.append(dict(rows[0]))
    write_rows(rows)
    asked = "train: train.jsonl, heldout: 0, quality: {refusal: reject}"
    run, ledger = prepared(recipe("kto", asked), tmp_path / "run")
    assert ledger["reasons"] == {"duplicate": 1, "refusal": 1, "secret": 1}
    assert "conflicting-answers" not in ledger["findings"]
    train = read_arrow(run.path / "data" / "train.arrow")
    assert [row["label"] for row in train] == [True, False] * 20 + [False]
    assert all(0 < sum(row["loss_mask"]) < row["length"] for row in train)
    assert ledger["tokens_trained_on"] == sum(sum(row["loss_mask"]) for row in train)


def test_nothing_of_prompts_and_references_is_trained_on(tmp_path: Path, recipe: Any, write_rows: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": question(i)} for i in range(10)]
    rows += [{"prompt": f"{question(i)} \nSay.", "answer": json.dumps({"a": i})} for i in range(10, 20)]
    write_rows([*rows, chat_row(question(0), "another row that asks the same"), {"prompt": f"Use {SECRET} {question(40)}"}])
    write_rows([{"prompt": question(5), "answer": "x"}, {"prompt": question(50)}], "test.jsonl")
    run, ledger = prepared(recipe("grpo", "train: train.jsonl, test: test.jsonl, heldout: 0"), tmp_path / "run")
    assert ledger["reasons"] == {"leaks-test": 1, "secret": 1}
    assert ledger["test"] == {"rows_in": 2, "rows_rejected": 1, "reasons": {"no-reference": 1}, "rows_test": 1}
    assert (ledger["tokens_trained_on"], ledger["rows_train"]) == (0, 20)
    assert ledger["formats"] == {"messages": 1, "prompt": 21}
    assert "conflicting-answers" not in ledger["findings"]
    train = read_arrow(run.path / "data" / "train.arrow")
    (cleaned,) = [row for row in train if row["where"].endswith(":11")]
    assert json.loads(cleaned["prompt"])[-1]["content"] == f"{question(10)}\nSay."
    assert json.loads(cleaned["reference"]) == {"a": 10}
    for row in train:
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        assert (row["reference"] is None) == (not any(row["loss_mask"]))


@pytest.mark.parametrize("objective", ["orpo", "reward"])
def test_pairs_whatever_the_objective(tmp_path: Path, recipe: Any, write_rows: Any, objective: str) -> None:
    pairs = [{"prompt": question(i), "chosen": f"{WORDS[i % 12]} {i}", "rejected": "no"} for i in range(12)]
    write_rows([*pairs, {"prompt": question(20), "chosen": "a " * 400, "rejected": "b"}])
    run, ledger = prepared(recipe(objective, "train: train.jsonl, heldout: 0, max_length: 200"), tmp_path / "run")
    assert ledger["reasons"] == {"too-long": 1}
    assert {"rejected_input_ids", "rejected_loss_mask"} <= read_arrow(run.path / "data" / "train.arrow")[0].keys()


def test_parts_of_rows_and_pieces_of_documents_are_reviewed_as_what_they_are_of(
    tmp_path: Path, recipe: Any, write_rows: Any
) -> None:
    documents = [{"text": f"{text(i, 6)} mail me at a.b@c{i}.org"} for i in range(3)]
    write_rows(documents, "texts.jsonl")
    turns = [message for i in range(6) for message in chat_row(question(i), f"{WORDS[i]} {i}")["messages"][1:]]
    write_rows([{"messages": turns}, *rows_of(2, 50)], "chats.jsonl")
    for objective, more in (("pretrain", "train: texts.jsonl"), ("sft", "train: chats.jsonl, overlong: split")):
        asked = f"{more}, heldout: 0, max_length: 64, review: {objective}.jsonl"
        run, _ = prepared(recipe(objective, asked), tmp_path / objective)
        session = Review(run)
        assert len(session.places) > 3
        shown = session.show(session.places[1])
        assert row_digest(shown.value) == row_digest(documents[0] if objective == "pretrain" else {"messages": turns})
        assert bool(shown.findings) == (objective == "pretrain")
        signed = review(session, "ann", Console(file=io.StringIO()), io.StringIO("r" + "a" * len(session.places)))
        assert signed is not None
        assert (signed["rejected"], signed["rows"]) == (1, len(session.places))
