"""Processes that a benchmark queries in turns: one line in, one line of JSON out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SLOWER = 1.25  # ends the search over sizes


def until_slower(tried: Iterable[T], seconds: Callable[[T], float]) -> Iterator[T]:
    """The settings tried, by size, up to the first that is clearly slower than the fastest so far."""
    fastest = math.inf
    for each in tried:
        print(each, flush=True)
        yield each
        if seconds(each) > SLOWER * fastest:
            return
        fastest = min(fastest, seconds(each))


class Side:
    """A process that runs a script in this folder, holds its model and works on request.

    `python` is the interpreter; `environment` is added to the process's own. Its stderr is discarded.
    """

    def __init__(
        self,
        name: str,
        script: str,
        arguments: Sequence[str],
        *,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(script)), name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def read(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError if the process has ended."""
        if self.process.stdout is None:
            raise AssertionError("the pipe was asked for")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        if self.process.stdin is None:
            raise AssertionError("the pipe was asked for")
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()
