"""A small task, and the command line in the tests' own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.commands import Inside, write
from tests.support.forked import Forked
from tunesmith import pipeline
from tunesmith.cli.main import main


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path, colour_rows: list[dict[str, Any]]) -> Path:
    """A folder with rows, test rows, schema and a recipe."""
    lines = [json.dumps(row) + "\n" for row in colour_rows]
    write(tmp_path / "train.jsonl", "".join([*lines[:32], lines[0]]))  # the last row is a copy
    write(tmp_path / "test.jsonl", "".join(lines[32:]))
    write(tmp_path / "schema.json", json.dumps({"type": "object", "required": ["colour"]}))
    recipe = f"""\
model: {tiny_model}
data: {{train: train.jsonl, test: test.jsonl, heldout: 0.1}}
train: {{max_steps: 3, effective_batch_size: 8}}
evaluate: {{json_schema: schema.json, label: colour, max_new_tokens: 8}}
"""
    return write(tmp_path / "recipe.yaml", recipe)


class Training(Forked):
    """Prints its messages where this process prints its own."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        code = super().wait(timeout)
        print(self.communicated()[1], end="", file=sys.stderr)
        self.close()
        return code


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    """The command line in this process, with the libraries already loaded; returns its output as `tunesmith` prints it."""

    def popen(command: list[str], *, env: Mapping[str, str], **_: Any) -> Forked:
        """A training of `run`, whose start is tested with all its details elsewhere."""
        assert command[1:4] == ["-P", "-m", "tunesmith"]
        return Training("tunesmith", command[4:], cwd=Path.cwd(), **env)

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))

    def run_it(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        out = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code if isinstance(code, int) else 1, out.out, out.err)

    return run_it
