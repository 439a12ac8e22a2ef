"""The recipes of public data sets: each loads its full set, and every row is trained, held out or rejected with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import small_sets
from tests.support.prepared import balanced
from tunesmith.recipe import load_recipe, parse_recipe
from tunesmith.runs import create_run, read_jsonl
from tunesmith.stages.prepare import prepare

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
ROWS = {
    "alpaca": 2390,
    "clinc150": 10625,
    "dpo": 300,
    "gsm8k": 7473,
    "hh_rlhf": 2312,
    "kto": 300,
    "nlupp": 1967,
    "pretrain": 300,
    "wnut17": 3394,
}
TEST_ROWS = {"clinc150": 4500, "gsm8k": 1319, "nlupp": 104, "wnut17": 1287}

JSON = ("nlupp", "wnut17")  # whose answers are JSON

#: Benchmarks must not be trained on; loading them shows what mappings can do.
OTHERS = {
    "mmlu": (
        """
  train: data/mmlu/test/anatomy_test.csv
  columns:
    prompt: "{{ question }}\\nA. {{ choice0 }}\\nB. {{ choice1 }}\\nC. {{ choice2 }}\\nD. {{ choice3 }}"
    completion: "{{ 'ABCD'[answer | int] }}"
""",
        135,
    ),
    "humaneval": (
        """
  train: data/humaneval/HumanEval.jsonl.gz
  columns: {prompt: prompt, completion: canonical_solution}
""",
        164,
    ),
}


def prepared(source: Path, folder: Path, shared_data: Path) -> tuple[dict[str, Any], Path]:
    (folder / "data").symlink_to(shared_data)
    run = create_run(load_recipe(source), folder / "run")
    return prepare(run), run.path / "data"


def whole(ledger: dict[str, Any]) -> bool:
    return balanced(ledger) and sum(ledger["reasons"].values()) == ledger["rows_rejected"]


def test_each_set_has_its_recipe() -> None:
    assert [path.stem for path in RECIPES] == sorted(ROWS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_rows_of_the_set_s_format_load(small_data: Path, tmp_path: Path, recipe: Path) -> None:
    """Needs no public data."""
    copy = tmp_path / recipe.name
    copy.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    ledger, data = prepared(copy, tmp_path, small_data)
    rows, test_rows = small_sets.ROWS[recipe.stem]
    assert (ledger["rows_in"], ledger["test"].get("rows_test")) == (rows, test_rows)
    assert whole(ledger)
    assert ledger["rows_train"] > 0.55 * rows
    answers = (
        [json.loads(row["messages"][-1]["content"]) for row in read_jsonl(data / "test.jsonl")] if recipe.stem in JSON else []
    )
    if recipe.stem == "nlupp":
        assert answers[1] == {"intents": ["ask", "birch"], "slots": {"stone": "birch"}}
    if recipe.stem == "wnut17":
        assert answers[0] == [{"type": "location", "text": "North Ember"}]


@pytest.mark.parametrize(("name", "rows"), [("mmlu", small_sets.EACH), ("humaneval", small_sets.EACH)])
def test_rows_of_a_benchmark_s_format_load_by_a_mapping(small_data: Path, tmp_path: Path, name: str, rows: int) -> None:
    source = tmp_path / "recipe.yaml"
    source.write_text(f"model: smollm2-135m-instruct\ndata:{OTHERS[name][0]}  on_bad_row: reject\n", encoding="utf-8")
    ledger, _ = prepared(source, tmp_path, small_data)
    assert ledger["rows_in"] == rows
    assert whole(ledger)


#: Sets of thousands of rows; smaller ones of the same kinds are in the first tier.
LARGE = ("clinc150", "gsm8k", "hh_rlhf")


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LARGE)) for path in RECIPES]
)
def test_the_set_loads_whole(shared_data: Path, tmp_path: Path, recipe: Path) -> None:
    copy = tmp_path / recipe.name
    copy.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    ledger, data = prepared(copy, tmp_path, shared_data)
    assert ledger["rows_in"] == ROWS[recipe.stem]
    assert whole(ledger)
    assert ledger["rows_train"] > 0.55 * ledger["rows_in"]
    assert ledger["test"].get("rows_test") == TEST_ROWS.get(recipe.stem)
    if recipe.stem == "clinc150":
        counts = ledger["balance"]
        assert len(counts) == 151
        assert max(count["after"] for count in counts.values()) <= 50 < max(count["before"] for count in counts.values())
    if recipe.stem in JSON:
        for row in read_jsonl(data / "test.jsonl"):
            json.loads(row["messages"][-1]["content"])


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_benchmarks_load_by_a_mapping(shared_data: Path, tmp_path: Path, name: str) -> None:
    data, rows = OTHERS[name]
    source = tmp_path / "recipe.yaml"
    source.write_text(f"model: smollm2-135m-instruct\ndata:{data}  on_bad_row: reject\n", encoding="utf-8")
    ledger, _ = prepared(source, tmp_path, shared_data)
    assert ledger["rows_in"] == rows
    assert whole(ledger)


def test_a_template_that_cannot_be_read_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the template of 'prompt' cannot be parsed") as caught:
        parse_recipe('model: x\ndata: {train: a.jsonl, columns: {prompt: "{{ a"}}\n', "recipe.yaml", tmp_path)
    assert "data.columns" in str(caught.value)
