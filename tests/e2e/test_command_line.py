"""A command's environment: its output stream, repeated arguments, a read-only home. Never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import chat_row
from tests.support.forked import ran
from tunesmith.errors import RecipeError, RunError
from tunesmith.plotting import figure, svg
from tunesmith.recipe import load_recipe, parse_recipe
from tunesmith.runs import create_run, open_run
from tunesmith.stages.compare import compare

COMMAND = [sys.executable, "-P", "-m", "tunesmith"]


def called(folder: Path, *arguments: str | Path, stdout: int = subprocess.PIPE, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        env=os.environ | environment,
        timeout=200,
    )
    error = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in error
    return done.returncode, (done.stdout or b"").decode("utf-8", "replace"), error


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    rows = [json.dumps(chat_row(f"Say {number}", f"so it is {number}")) for number in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = f"model: {tiny_model}\ndata: {{train: train.jsonl, heldout: 0.3}}\n"
    more = "train: {max_steps: 1, effective_batch_size: 2}\nevaluate: {max_new_tokens: 2, task: text}\n"
    (tmp_path / "recipe.yaml").write_text(text + more, encoding="utf-8")
    return tmp_path


def test_a_full_device_is_told(folder: Path) -> None:
    for command in (["plan", "qwen2-7b", "--gpu", "24GB"], ["--help"], ["prepare", "recipe.yaml", "--run", "run"]):
        with Path("/dev/full").open("wb") as full:
            code, _, error = called(folder, *command, stdout=full.fileno())
        assert code == 2, command
        assert "No space left on device" in error
    assert (folder / "run" / "data" / "ledger.json").is_file()  # the work is done, only the final message is lost


def test_a_reader_that_has_left_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code, _, error = called(folder, "plan", "qwen2-7b", "--gpu", "24GB", stdout=write)
    os.close(write)
    assert (code in {1, 141}, error) == (True, "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_with_letters_that_the_terminal_lacks(folder: Path, encoding: str) -> None:
    code, out, error = called(folder, "prepare", "recipe.yaml", "--run", "läufe/\u4e2d", PYTHONIOENCODING=encoding)
    assert code == 0, error
    assert "\u4e2d" in out or "\\u4e2d" in out


def test_a_home_that_cannot_be_written(folder: Path) -> None:
    """Commands work without caches; the built-in model, which needs a cache, gives a readable error."""
    home = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "TUNESMITH_CALIBRATION": "", "TUNESMITH_CACHE": ""}
    prepared = ran("tunesmith", ["prepare", "recipe.yaml", "--run", "run"], cwd=folder, **home)
    assert prepared.returncode == 0, prepared.stderr
    code, _, error = called(folder, "train", "run", **home)
    assert code == 0, error
    (folder / "builtin.yaml").write_text("model: smollm2-135m-instruct\ndata: {train: train.jsonl}\n", encoding="utf-8")
    code, _, error = called(folder, "prepare", "builtin.yaml", "--run", "other", **home)
    assert code == 2
    assert "TUNESMITH_CACHE" in error


def test_what_is_named_twice_is_refused(folder: Path) -> None:
    code, _, error = called(folder, "run", "recipe.yaml", "--run", "out", "--methods", "lora,lora")
    assert (code, "a method is listed twice" in error, (folder / "out").exists()) == (2, True, False)
    run = create_run(load_recipe(folder / "recipe.yaml"), folder / "run")
    with pytest.raises(RunError, match="TS602"):
        compare([run, open_run(folder / "run" / ".." / "run")], folder / "both")
    assert not (folder / "both").exists()


def test_a_dollar_in_a_figure_is_a_dollar() -> None:
    made, axes = figure(3, 2)
    axes.set_title("run $\\frac$ costs 5$")
    assert "run $\\frac$ costs 5$" in svg(made)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("model: x\nseed: 1\nseed: 2\ndata: {train: a.jsonl}\n", "recipe.yaml:3:1"),
        ("model: x\ndata: {train: a.jsonl, train: b.jsonl}\n", "recipe.yaml:2:24"),
        ("model: x\ndata:\n  train: a.jsonl\n  'train': b.jsonl\n", "recipe.yaml:4:3"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml", Path("/base"))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where, "duplicate key" in problem.what) == ("TS001", where, True)


def test_merged_keys_may_be_overridden() -> None:
    text = "model: x\ndata: &d {train: a.jsonl, heldout: 0.1}\n"
    assert parse_recipe(text, "recipe.yaml", Path("/base")).recipe.data.heldout == 0.1
    merged = "model: x\ndata:\n  <<: {train: a.jsonl, heldout: 0.1}\n  heldout: 0.2\n"
    assert parse_recipe(merged, "recipe.yaml", Path("/base")).recipe.data.heldout == 0.2
