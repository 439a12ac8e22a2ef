"""The run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from tunesmith.errors import DataError, RecipeError, RunError
from tunesmith.io.atomic import append_jsonl
from tunesmith.planner.datafacts import prepared_facts
from tunesmith.runs import create_run, open_run, prepared_rows, read_jsonl


def test_lines_with_unusual_separators_are_read_back(tmp_path: Path) -> None:
    values = [{"text": "a\u2028b\u0085c\x0bd\r\n"}, {"text": ""}]
    for value in values:
        append_jsonl(tmp_path / "a.jsonl", value)
    assert read_jsonl(tmp_path / "a.jsonl") == values
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_recipe_comes_back(make_recipe: Any, tmp_path: Path) -> None:
    resolved = make_recipe(method="qlora", train__learning_rate=0.5)
    create_run(resolved, tmp_path / "run")
    assert open_run(tmp_path / "run").recipe == resolved.recipe
    assert resolved.origins["method"] == "override"


def test_a_formatter_may_remove_the_comments(make_recipe: Any, tmp_path: Path) -> None:
    resolved = make_recipe()
    file = create_run(resolved, tmp_path / "run").path / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text(encoding="utf-8"))), encoding="utf-8")
    assert open_run(tmp_path / "run").recipe == resolved.recipe
    assert create_run(resolved, tmp_path / "run").recipe == resolved.recipe


def test_failed_stage_keeps_the_old_output(make_recipe: Any, tmp_path: Path) -> None:
    run = create_run(make_recipe(), tmp_path / "run")
    with run.perform("stage", "out", {"a": "1"}) as folder:
        (folder / "x").write_text("old", encoding="utf-8")
    assert run.is_current("stage", {"a": "1"})
    assert not run.is_current("stage", {"a": "2"})

    def fail() -> None:
        with run.perform("stage", "out", {"a": "2"}) as folder:
            (folder / "x").write_text("new", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (run.path / "out" / "x").read_text(encoding="utf-8") == "old"
    assert run.is_current("stage", {"a": "1"})
    (run.path / "out" / "x").write_text("touched", encoding="utf-8")
    assert not run.is_current("stage", {"a": "1"})


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path)


def test_a_method_that_is_still_auto_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="still auto"):
        create_run(make_recipe(method="auto"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_a_run_that_is_worked_on_stays(make_recipe: Any, tmp_path: Path) -> None:
    run = create_run(make_recipe(), tmp_path / "run")
    before = (run.path / "recipe.yaml").read_bytes()
    with run.perform("score", "score", {}):
        create_run(make_recipe(), run.path)  # the same recipe: nothing to write
        with pytest.raises(RunError, match="TS014"):
            create_run(make_recipe(seed=7), run.path)
        assert (run.path / "recipe.yaml").read_bytes() == before
    create_run(make_recipe(seed=7), run.path)
    assert (run.path / "recipe.yaml").read_bytes() != before


def test_rows_of_an_earlier_version_are_refused(make_recipe: Any, tmp_path: Path) -> None:
    """Their loss mask has another name: every reader says so."""
    run = create_run(make_recipe(), tmp_path / "run")
    data = run.path / "data"
    data.mkdir()
    table = pa.table({"input_ids": [[1, 2]], "trained": [[False, True]]})
    with pa.OSFile(str(data / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    for read in (lambda: prepared_rows(run, "train"), lambda: prepared_facts(data)):
        with pytest.raises(DataError, match="now called 'loss_mask'") as caught:
            read()
        assert caught.value.problems[0].code == "TS113"
