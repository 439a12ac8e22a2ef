"""No command removes or replaces files that tunesmith did not write: one case per command and path that it writes to."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.commands import app
from tunesmith.cli.main import main
from tunesmith.recipe import load_recipe, parse_recipe
from tunesmith.runs import create_run, open_run
from tunesmith.stages.evaluate import evaluate
from tunesmith.stages.export import export
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train


@pytest.fixture(scope="module")
def done_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, colour_rows: list[Any]) -> Path:
    """A folder with a recipe and an evaluated run."""
    folder = tmp_path_factory.mktemp("done")
    lines = [json.dumps(row) + "\n" for row in colour_rows]
    (folder / "train.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[32:]), encoding="utf-8")
    text = f"""\
model: {tiny_model}
data: {{train: train.jsonl, test: test.jsonl, heldout: 0.1}}
train: {{max_steps: 1, effective_batch_size: 4}}
evaluate: {{max_new_tokens: 4}}
augment: {{out: more.jsonl}}
"""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    run = create_run(load_recipe(folder / "recipe.yaml"), folder / "run")
    prepare(run)
    train(run)
    export(run)
    evaluate(run)
    return folder


@pytest.fixture
def done(done_once: Path, tmp_path: Path) -> Path:
    """A copy of it; its recipe's paths point to the copy."""
    folder = tmp_path / "work"
    shutil.copytree(done_once, folder)
    return folder


def _mydocs(folder: Path) -> Path:
    """A folder of the user."""
    docs = folder / "mydocs"
    docs.mkdir()
    (docs / "thesis.txt").write_text("years of work", encoding="utf-8")
    return docs


def _thesis(folder: Path) -> Path:
    """A file of the user."""
    path = folder / "thesis.txt"
    path.write_text("years of work", encoding="utf-8")
    return path


def _runs(folder: Path) -> Path:
    """The folder that holds the runs."""
    runs = folder / "runs"
    runs.mkdir()
    (folder / "run").rename(runs / "run")
    return runs


def _beside(folder: Path, name: str) -> Path:
    """A user's file in a folder of the run; returns the file's path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("my notes", encoding="utf-8")
    return path


def _edit(folder: Path, name: str) -> Path:
    """A user's line in one of tunesmith's files; returns the file's path."""
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    return path


def _beside_changed(folder: Path, name: str, override: str) -> Path:
    """A user's file in a folder of the run that the changed recipe would write again; returns the file's path."""
    create_run(load_recipe(folder / "run" / "recipe.yaml", [override]), folder / "run")
    return _beside(folder, name)


def _review_file(folder: Path) -> Path:
    """A user's file that a prepared run's recipe names as its review file; returns its path."""
    (folder / "run").rename(folder / "old")
    prepare(create_run(load_recipe(folder / "recipe.yaml", ["data.review=thesis.txt"]), folder / "run"))
    return _thesis(folder)


def _evaluation(folder: Path) -> str:
    (name,) = [p.parent.relative_to(folder) for p in folder.glob("run/eval/*/task/results.json")]
    return f"{name}/results.json"


_RATE = "train.learning_rate=0.1"

#: By name: the command, what to create, and the arguments that would replace it.
CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "plan a folder": (_mydocs, ["plan", "{model}", "--gpu", "24GB", "--out", "{0}"]),
    "plan a file": (_thesis, ["plan", "{model}", "--gpu", "24GB", "--out", "{0}"]),
    "plan a run": (lambda at: at / "run", ["plan", "{model}", "--gpu", "24GB", "--out", "{0}"]),
    "plan the working folder": (lambda at: at, ["plan", "{model}", "--gpu", "24GB", "--out", "."]),
    "compare the runs": (_runs, ["compare", "{0}/run", "--out", "{0}"]),
    "compare a file": (_thesis, ["compare", "run", "--out", "{0}"]),
    "prepare a folder": (_mydocs, ["prepare", "recipe.yaml", "--run", "{0}"]),
    "prepare a file": (_thesis, ["prepare", "recipe.yaml", "--run", "{0}"]),
    "prepare what has a run.json": (
        lambda at: _beside(at, "other/run.json").parent,
        ["prepare", "recipe.yaml", "--run", "{0}"],
    ),
    "prepare notes": (
        lambda at: _beside_changed(at, "run/data/notes.txt", "data.heldout=0.2"),
        ["prepare", "run/recipe.yaml", "--run", "run"],
    ),
    "prepare an edited recipe": (
        lambda at: _beside(at, "run/recipe.yaml"),
        ["prepare", "recipe.yaml", "--run", "run", "--set", "data.heldout=0.2"],
    ),
    "run a folder": (_mydocs, ["run", "recipe.yaml", "--run", "{0}"]),
    "run a file": (_thesis, ["run", "recipe.yaml", "--run", "{0}"]),
    "run a comparison": (
        lambda at: _beside(at, "out/compare/mine.txt"),
        ["run", "recipe.yaml", "--run", "out", "--methods", "lora"],
    ),
    "review a folder": (_mydocs, ["review", "recipe.yaml", "--run", "{0}"]),
    "review decisions": (_review_file, ["review", "run"]),
    "train notes": (lambda at: _beside_changed(at, "run/train/notes.txt", _RATE), ["train", "run"]),
    "train a checkpoint": (
        lambda at: _beside_changed(at, "run/train/checkpoints/step-000001/mine.txt", _RATE),
        ["train", "run"],
    ),
    "export notes": (
        lambda at: _beside_changed(at, "run/export/merged/notes.txt", "export.max_shard_size=1GB"),
        ["export", "run"],
    ),
    "export an edited config": (lambda at: _edit(at, "run/export/merged/config.json"), ["export", "run"]),
    "evaluate": (lambda at: _edit(at, _evaluation(at)), ["evaluate", "run"]),
    "augment rows": (lambda at: _beside(at, "more.jsonl"), ["augment", "recipe.yaml"]),
    "augment summary": (lambda at: _beside(at, "more.jsonl.summary.json"), ["augment", "recipe.yaml"]),
    "augment cache": (lambda at: _beside(at, "more.jsonl.cache"), ["augment", "recipe.yaml"]),
    "demo input": (lambda at: _beside(at, "show/input/train.jsonl"), ["demo", "--out", "show"]),
    "demo comparison": (lambda at: _beside(at, "show/compare/mine.txt"), ["demo", "--out", "show"]),
    "demo a file": (_thesis, ["demo", "--out", "{0}"]),
}


def _tree(folder: Path) -> dict[str, bytes | None]:
    kept = (p for p in folder.rglob("*") if not {".lock", ".holder.json"} & {p.name})
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in kept}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_ours_is_refused_by_name(
    name: str, done: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, arguments = CASES[name]
    mine = put(done)
    before = _tree(done)
    code, error = _called([each.format(mine, model=tiny_model) for each in arguments], done, monkeypatch, capsys)
    assert code == 2, error
    assert any(stable in error for stable in ("TS015", "TS010", "TS132")), error
    assert Path(mine).name in error.replace("\n", "") or name == "plan the working folder"
    after = _tree(done)
    ours = {"run/run.json", "run/recipe.yaml"}  # the request for a new recipe may be recorded
    kept = {path: content for path, content in before.items() if path not in ours}
    assert {path: after.get(path) for path in kept} == kept
    assert (Path(mine).read_bytes() if Path(mine).is_file() else None) == before.get(Path(mine).relative_to(done).as_posix())


def _called(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and error text of a command. A command that forbids torch in its process runs in its own process."""
    if arguments[0] == "prepare":
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "tunesmith", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        return ran.returncode, ran.stderr
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tunesmith", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0), capsys.readouterr().err


def test_each_command_that_takes_a_path_has_a_case() -> None:
    tried = {arguments[0] for _, arguments in CASES.values()}
    takes = {
        command.callback.__name__
        for command in app.registered_commands
        if command.callback
        and any("Path" in str(p.annotation) for p in inspect.signature(command.callback).parameters.values())
    }
    assert takes - tried == set()


def test_own_output_is_replaced(done: Path, tiny_model: Path, monkeypatch: Any, capsys: Any) -> None:
    for arguments in (["plan", str(tiny_model), "--gpu", "24GB", "--out", "p"], ["compare", "run", "--out", "c"]):
        for _ in range(2):
            code, error = _called(arguments, done, monkeypatch, capsys)
            assert code == 0, error
    assert sorted(p.name for p in (done / "p").iterdir()) == [".tunesmith", "frontier.svg", "plan.json", "recipe.yaml"]


def test_a_plan_writes_only_where_it_is_told_to(done: Path, tiny_model: Path, monkeypatch: Any, capsys: Any) -> None:
    before = _tree(done)
    assert _called(["plan", str(tiny_model), "--gpu", "24GB"], done, monkeypatch, capsys)[0] == 0
    assert _tree(done) == before


def test_a_recipe_edited_since_is_told(done: Path, monkeypatch: Any, capsys: Any) -> None:
    path = done / "run" / "recipe.yaml"
    text = path.read_text(encoding="utf-8")
    for key, stage in (("  max_steps: 1 ", "train"), ("  heldout: 0.1 ", "prepare")):
        assert key in text
        path.write_text(text.replace(key, key.replace("1 ", "2 ")), encoding="utf-8")
        for command in ("export", "evaluate"):
            code, error = _called([command, "run"], done, monkeypatch, capsys)
            assert (code, "TS012" in error, stage in error) == (2, True, True), (command, error)
    path.write_text(text, encoding="utf-8")
    assert open_run(done / "run").recipe == parse_recipe(text, "recipe.yaml", Path("/")).recipe
    assert _called(["export", "run"], done, monkeypatch, capsys)[0] == 0
