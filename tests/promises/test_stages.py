"""Stages are idempotent, whenever they are killed, and need no network access."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import chat_row
from tests.promises.training import Promises
from tests.support.forked import Forked, ran
from tunesmith.io.atomic import sha256_file

ROOT = Path(__file__).resolve().parents[2]
#: The folder that each stage writes, in stage order.
STAGES = {"prepare": "data", "train": "train", "export": "export", "evaluate": "eval"}
#: Files with times or durations.
TIMED = {"metrics.jsonl", "summary.json", "results.json", "proof.json", "events.jsonl", "report.html", "cost.json"}


@pytest.fixture
def make_recipe_file(tmp_path: Path, tiny_model: Path, colour_rows: list[Any], write_rows: Any) -> Callable[[str], Path]:
    write_rows(colour_rows)
    write_rows(colour_rows[:3], "test.jsonl")

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"model: {tiny_model}\nmethod: lora\ndata: {{train: train.jsonl, heldout: 0.1, test: test.jsonl, "
            "duplicates: {threshold: null}}\ntrain: {max_steps: 6, save_steps: 1}\nevaluate: {max_new_tokens: 4}\n",
            encoding="utf-8",
        )
        return path

    return make


def command(stage: str, recipe: Path, run: Path) -> list[str]:
    return [stage, str(recipe), "--run", str(run)] if stage == "prepare" else [stage, str(run)]


def done(stage: str, recipe: Path, run: Path) -> None:
    ended = ran("tunesmith", command(stage, recipe, run))
    assert ended.returncode == 0, ended.stderr


def digests(run: Path, folder: str) -> dict[str, str]:
    """Digests of a stage's files, except those with times."""
    files = [path for path in (run / folder).rglob("*") if path.is_file() and path.name not in TIMED]
    return {path.relative_to(run).as_posix(): sha256_file(path) for path in files}


def killed_once(arguments: list[str], seconds: float, made: Path) -> bool:
    """Kill a stage after `seconds`; earlier if it would have finished by then, since that would test nothing."""
    for _ in range(5):
        with Forked("tunesmith", arguments) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return True
        shutil.rmtree(made)
        seconds *= 0.6
    return False


def test_a_killed_stage_does_the_same_again(
    make_recipe_file: Callable[[str], Path], tmp_path: Path, promises: Promises
) -> None:
    """Killed at random moments and restarted, each stage leaves its undisturbed result; run once more, it does nothing."""
    draw = random.Random(42)
    kills = 4 if promises.long else 1
    stages = STAGES if promises.long else {"prepare": "data", "train": "train"}
    recipe = make_recipe_file("recipe")
    whole, timed, parts = (tmp_path / name for name in ("whole", "timed", "parts"))
    killed = differing = 0
    for stage, folder in stages.items():
        done(stage, recipe, whole)
        begun = time.perf_counter()
        done(stage, recipe, timed)  # the first one reads files that are in no cache yet
        took = time.perf_counter() - begun
        for _ in range(kills):
            killed += killed_once(command(stage, recipe, parts), draw.uniform(0.3, 0.95) * took, parts / folder)
        done(stage, recipe, parts)
        wanted = digests(whole, folder)
        assert wanted
        found = digests(parts, folder)
        differing += found != wanted
        assert found == wanted, stage
        before = {path: path.stat().st_mtime_ns for path in sorted(parts.rglob("*")) if path.is_file()}
        done(stage, recipe, parts)
        after = {path: path.stat().st_mtime_ns for path in sorted(parts.rglob("*")) if path.is_file()}
        written = {path.name for path in after if after[path] != before.get(path)}
        assert written <= {"recipe.yaml", ".lock"}, (stage, written)  # each start resolves the recipe, to the same text
    assert killed == kills * len(stages)
    promises.state("stages killed", "count", stages_killed=killed, stages_differing=differing)


def test_a_killed_prepare_leaves_no_process_behind(tmp_path: Path, tiny_model: Path) -> None:
    rows = (json.dumps(chat_row(f"Say {number} in words", f"so it is {number}")) for number in range(6000))
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\ndata: {{train: train.jsonl, workers: 2}}\n", encoding="utf-8")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    arguments = [sys.executable, "-m", "tunesmith", *command("prepare", recipe, tmp_path / "run")]
    with subprocess.Popen(arguments, **quiet) as process:
        started: list[psutil.Process] = []
        while process.poll() is None and len(started) < 4:  # two workers, the server that forks them, the tracker
            started = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        assert len(started) == 4
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


@pytest.fixture
def cut(tmp_path: Path, real_model: Path) -> dict[str, str]:
    """An environment without network access; attempts are recorded in the file `attempts`. The built-in model is available."""
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("offline.py"), folder / "sitecustomize.py")
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search, "TUNESMITH_ATTEMPTS": str(tmp_path / "attempts")}


def test_no_stage_needs_a_network(make_recipe_file: Any, tmp_path: Path, cut: dict[str, str]) -> None:
    """Each stage, with every connection refused and recorded."""
    recipe, run = make_recipe_file("recipe"), tmp_path / "run"
    for stage in STAGES:
        ended = ran("tests.promises.cut", command(stage, recipe, run), **cut)
        assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "attempts").exists()
    hub = ["prepare", str(recipe), "--set", "data.train=hub:some/set", "--run", str(tmp_path / "other")]
    ended = ran("tests.promises.cut", hub, **cut)
    assert ended.returncode == 2
    assert (tmp_path / "attempts").exists()


@pytest.mark.slow
def test_nothing_needs_a_network(make_recipe_file: Any, tmp_path: Path, cut: dict[str, str], promises: Promises) -> None:
    """All stages of a run, and in the long version the whole demo, with every connection refused and recorded."""
    commands = [["run", str(make_recipe_file("recipe")), "--run", str(tmp_path / "run")]]
    commands += [["demo", "--out", str(tmp_path / "demo")]] if promises.long else []
    for arguments in commands:
        begin = [sys.executable, "-m", "tunesmith"]
        finished = subprocess.run([*begin, *arguments], check=False, capture_output=True, text=True, cwd=ROOT, env=cut)
        assert finished.returncode == 0, (arguments, finished.stderr)
    attempts = tmp_path / "attempts"
    made = attempts.read_text(encoding="utf-8").splitlines() if attempts.exists() else []
    assert not made
    results = next((tmp_path / "run" / "eval").rglob("results.json"))
    assert json.loads(results.read_text(encoding="utf-8"))
    promises.state("offline", "count", offline_commands=len(commands), connection_attempts=len(made))


def test_an_attempt_to_connect_would_be_seen(tmp_path: Path, cut: dict[str, str]) -> None:
    code = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError as error:\n    print(error)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    finished = subprocess.run([sys.executable, "-c", child], check=True, capture_output=True, text=True, env=cut)
    assert finished.stdout.strip() == "the network is cut"
    assert "127.0.0.1" in (tmp_path / "attempts").read_text(encoding="utf-8")
