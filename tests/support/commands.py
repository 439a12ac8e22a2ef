"""The command line, as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

#: The command line in the tests' own process (a fixture).
Inside = Callable[..., subprocess.CompletedProcess[str]]


def tunesmith(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def check_readable(done: subprocess.CompletedProcess[str], code: str, where: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert code in done.stderr
    assert where in done.stderr
    assert "why" in done.stderr
    assert "fix" in done.stderr
    assert done.stdout == ""
