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


def prepared(recipe: str, folder: Path, data: Path) -> tuple[dict[str, Any], Path]:
    """The ledger and the folder of what a recipe's text prepares from the sets in `data`."""
    (folder / "data").symlink_to(data)
    source = folder / "recipe.yaml"
    source.write_text(recipe, encoding="utf-8")
    run = create_run(load_recipe(source), folder / "run")
    return prepare(run), run.path / "data"


def json_answers(data: Path) -> list[Any]:
    """The answers of the prepared test rows, each of which is JSON."""
    return [json.loads(row["messages"][-1]["content"]) for row in read_jsonl(data / "test.jsonl")]


def whole(ledger: dict[str, Any]) -> bool:
    return balanced(ledger) and sum(ledger["reasons"].values()) == ledger["rows_rejected"]


def test_each_set_has_its_recipe() -> None:
    assert [path.stem for path in RECIPES] == sorted(ROWS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_rows_of_the_set_s_format_load(small_data: Path, tmp_path: Path, recipe: Path) -> None:
    """Needs no public data."""
    ledger, data = prepared(recipe.read_text(encoding="utf-8"), tmp_path, small_data)
    rows, test_rows = small_sets.ROWS[recipe.stem]
    assert (ledger["rows_in"], ledger["test"].get("rows_test")) == (rows, test_rows)
    assert whole(ledger)
    assert ledger["rows_train"] > 0.55 * rows
    if recipe.stem == "nlupp":
        assert json_answers(data)[1] == {"intents": ["ask", "birch"], "slots": {"stone": "birch"}}
    if recipe.stem == "wnut17":
        assert json_answers(data)[0] == [{"type": "location", "text": "North Ember"}]


#: Sets of thousands of rows; smaller ones of the same kinds are in the first tier.
LARGE = ("clinc150", "gsm8k", "hh_rlhf")


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LARGE)) for path in RECIPES]
)
def test_the_set_loads_whole(shared_data: Path, tmp_path: Path, recipe: Path) -> None:
    ledger, data = prepared(recipe.read_text(encoding="utf-8"), tmp_path, shared_data)
    assert ledger["rows_in"] == ROWS[recipe.stem]
    assert whole(ledger)
    assert ledger["rows_train"] > 0.55 * ledger["rows_in"]
    assert ledger["test"].get("rows_test") == TEST_ROWS.get(recipe.stem)
    if recipe.stem == "clinc150":
        counts = ledger["balance"]
        assert len(counts) == 151
        assert max(count["after"] for count in counts.values()) <= 50 < max(count["before"] for count in counts.values())
    if recipe.stem in ("nlupp", "wnut17"):
        assert json_answers(data)


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("data", ["small_data", "shared_data"])
def test_benchmarks_load_by_a_mapping(request: pytest.FixtureRequest, tmp_path: Path, data: str, name: str) -> None:
    mapping, rows = OTHERS[name]
    text = f"model: smollm2-135m-instruct\ndata:{mapping}  on_bad_row: reject\n"
    ledger, _ = prepared(text, tmp_path, request.getfixturevalue(data))
    assert ledger["rows_in"] == (small_sets.EACH if data == "small_data" else rows)
    assert whole(ledger)


def test_a_template_that_cannot_be_read_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the template of 'prompt' cannot be parsed") as caught:
        parse_recipe('model: x\ndata: {train: a.jsonl, columns: {prompt: "{{ a"}}\n', "recipe.yaml", tmp_path)
    assert "data.columns" in str(caught.value)
