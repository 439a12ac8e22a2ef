"""No file in a command's working folder is executed: a canary under every name that Python could import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tests.support.forked import ran

COMMAND = Path(sys.executable).with_name("tunesmith")
RECIPE = """
model: {model}
method: full
data: {{train: train.jsonl, test: test.jsonl, heldout: 0.1, max_rows: 600, max_length: 256, workers: 2}}
train: {{max_steps: 1, effective_batch_size: 2}}
evaluate: {{max_rows: 2, max_new_tokens: 4, task: text}}
"""
GRPO = """
model: {model}
method: lora
objective: grpo
data: {{train: train.jsonl, max_rows: 8, max_length: 256}}
grpo: {{reward_funcs: ["mine.py:f"], num_generations: 2, max_completion_length: 4}}
train: {{max_steps: 1, effective_batch_size: 2}}
"""


@pytest.fixture(scope="module")
def imported_by_python(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Modules that `python -m` itself imports before a package's first line, which no package can prevent."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "first.py").write_text("import sys\nprint(*sys.modules)\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "first"], cwd=folder, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.fixture
def hostile(tmp_path: Path, imported_by_python: set[str]) -> Callable[[bool], Path]:
    """A folder full of modules that leave a canary; for `python -m`, without the names that Python itself must find."""

    def make(by_module: bool) -> Path:
        folder = tmp_path / "somebody"
        folder.mkdir()
        names = {*sys.stdlib_module_names, *metadata.packages_distributions(), "sitecustomize", "usercustomize"}
        names -= {"tunesmith", *sys.builtin_module_names, *(imported_by_python if by_module else ())}
        assert {"peft", "torch", "socket", "typing", "multiprocessing", "pip"} <= names
        text = f"open({str(tmp_path / 'canary')!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(77)\n"
        for name in filter(str.isidentifier, names):
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        # Programs and settings that are found by name.
        for name in ("g++", "c++", "cc", "nvidia-smi", "vi", "git", "python", "ldconfig"):
            program = folder / name
            program.write_text(f"#!/bin/sh\necho {name} >> {tmp_path / 'canary'}\n", encoding="utf-8")
            program.chmod(0o755)
        (folder / "matplotlibrc").write_text("svg.fonttype: nonsense\nbackend: module://peft\n", encoding="utf-8")
        return folder

    return make


def _called(folder: Path, command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=300
    )


def _untouched(folder: Path) -> None:
    canary = folder.parent / "canary"
    assert not canary.exists(), canary.read_text(encoding="utf-8")


@pytest.fixture
def with_rows(hostile: Callable[[bool], Path], tiny_model: Path, colour_rows: list[dict[str, Any]]) -> Callable[..., Path]:
    """A hostile folder with a recipe and rows; each row comes so many times, with different further turns."""

    def make(recipe: str = RECIPE, *, by_module: bool = False, times: int = 1) -> Path:
        folder = hostile(by_module)
        lines = [json.dumps({"messages": [*row["messages"], *turn]}) for turn in _turns(times) for row in colour_rows]
        (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        test = [json.dumps(chat_row(question, "yes")) for question in ("Is the sea salty?", "Do whales breathe air?")]
        (folder / "test.jsonl").write_text("\n".join(test), encoding="utf-8")
        (folder / "recipe.yaml").write_text(recipe.format(model=tiny_model), encoding="utf-8")
        return folder

    return make


def _turns(times: int) -> list[list[dict[str, str]]]:
    """Additional turns that make copies of a row differ."""
    return [
        [{"role": "user", "content": f"And number {each} {'again ' * each}?"}, {"role": "assistant", "content": f"{each}"}]
        for each in range(times)
    ]


def test_the_training_of_run_in_a_hostile_folder(with_rows: Callable[..., Path]) -> None:
    """`run` starts a process for it."""
    folder = with_rows()
    done = ran("tunesmith", ["run", "recipe.yaml", "--run", "out"], cwd=folder)
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("by_module", [False, True])
def test_all_stages_in_a_hostile_folder(by_module: bool, with_rows: Callable[..., Path]) -> None:
    folder = with_rows(by_module=by_module, times=2 if by_module else 30)
    command = [sys.executable, "-m", "tunesmith"] if by_module else [COMMAND]
    # An empty path entry means the working folder.
    done = _called(folder, [*command, "run", "recipe.yaml", "--run", "out"], PATH=f":.:{os.environ['PATH']}")
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    _compare(folder, command)


def _compare(folder: Path, command: list[str | Path]) -> None:
    """matplotlib's settings there do not change any figure, and are not even read."""
    done = _called(folder, [*command, "compare", "out", "--out", "report"])
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "matplotlib" not in done.stderr


def test_workers_in_a_hostile_folder(with_rows: Callable[..., Path]) -> None:
    folder = with_rows(times=30)
    done = _called(folder, [COMMAND, "prepare", "recipe.yaml", "--run", "out"], PATH=f":.:{os.environ['PATH']}")
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_comparison_in_a_hostile_folder(with_rows: Callable[..., Path]) -> None:
    folder = with_rows()
    for arguments in (["prepare", "recipe.yaml", "--run", "out"], ["train", "out"], ["export", "out"], ["evaluate", "out"]):
        done = ran("tunesmith", arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    _compare(folder, [COMMAND])


def test_the_module_in_a_hostile_folder(hostile: Callable[[bool], Path]) -> None:
    """As torchrun starts it."""
    folder = hostile(True)
    done = _called(folder, [sys.executable, "-u", "-m", "tunesmith", "train", "nowhere"])
    _untouched(folder)
    assert done.returncode == 2
    assert "TS010" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_processes_of_torchrun_in_a_hostile_folder(with_rows: Callable[..., Path]) -> None:
    folder = with_rows(by_module=True)
    assert _called(folder, [COMMAND, "prepare", "recipe.yaml", "--run", "out"]).returncode == 0
    launcher = [COMMAND.with_name("torchrun"), "--standalone", "--nproc-per-node", "2"]
    done = _called(folder, [*launcher, "-m", "tunesmith", "train", "out"])
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_reward_is_its_file_alone(with_rows: Callable[..., Path]) -> None:
    """A reward's imports do not find files next to it, and forged byte code for it is not used."""
    folder = with_rows(GRPO)
    reward = folder / "mine.py"
    reward.write_text("import json, socket, fractions\ndef f(p, answers, r): return [len(each) for each in answers]\n", "utf-8")
    forged = f"open({str(folder.parent / 'canary')!r}, 'a').write('byte code')\n{reward.read_text(encoding='utf-8')}"
    _write_byte_code(reward, forged)
    done = ran("tunesmith", ["prepare", "recipe.yaml", "--run", "out"], cwd=folder)
    _untouched(folder)
    assert done.returncode == 0, done.stderr
    done = _called(folder, [COMMAND, "train", "out"])
    _untouched(folder)
    assert done.returncode == 0, done.stderr[-3000:]


def _write_byte_code(path: Path, text: str) -> None:
    """Byte code of different text, at the path and with the time and size that Python checks."""
    code = (
        "import importlib.util, importlib._bootstrap_external as b, sys, pathlib\n"
        "path, text = sys.argv[1:]\n"
        "told = pathlib.Path(path).stat()\n"
        "made = b._code_to_timestamp_pyc(compile(text, path, 'exec'), int(told.st_mtime), told.st_size)\n"
        "target = pathlib.Path(importlib.util.cache_from_source(path))\n"
        "target.parent.mkdir()\n"
        "target.write_bytes(made)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(path), text], check=True)


def test_no_kernel_is_fetched_from_a_hub(tmp_path: Path) -> None:
    """Even with the package that fetches them installed, it is not imported."""
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'a').write('kernels')\n", encoding="utf-8")
    code = (
        "import sys\n"
        "from tunesmith.cli import main as module\n"
        "def main():\n"
        "    import bitsandbytes, transformers\n"
        "    from transformers.integrations.hub_kernels import _kernels_enabled\n"
        "    assert not _kernels_enabled\n"
        "    sys.exit(0)\n"
        "module.main = main\n"
        "from tunesmith.__main__ import main\n"
        "main()\n"
    )
    done = _called(tmp_path, [sys.executable, "-P", "-c", code], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("named", ["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"])
def test_a_relative_entry_of_a_path_is_dropped_and_an_absolute_one_stays(named: str, tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(77)\n", encoding="utf-8")
    code = (
        "import os, sys\n"
        "from tunesmith.safepath import leave_working_folder\n"
        "leave_working_folder()\n"
        f"print(os.environ[{named!r}], *sys.path, sep='\\n')\n"
        "import colorsys\n"
    )
    done = _called(tmp_path, [sys.executable, "-c", code], **{named: os.pathsep.join(["", ".", "/absolute", "sub"])})
    assert done.returncode == 0, done.stderr
    value, *path = done.stdout.splitlines()
    assert value == "/absolute"
    assert not {"", ".", str(tmp_path), str(tmp_path / "sub")} & set(path)
    assert ("/absolute" in path) == (named == "PYTHONPATH")


@pytest.mark.parametrize("named", ["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"])
def test_a_path_of_relative_entries_alone_is_taken_away(named: str, tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from tunesmith.safepath import leave_working_folder\n"
        "leave_working_folder()\n"
        f"print(os.environ.get({named!r}, ''))\n"
    )
    for value in (".", "sub", os.pathsep.join(["", ".", "sub"])):
        done = _called(tmp_path, [sys.executable, "-c", code], **{named: value})
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == ""
