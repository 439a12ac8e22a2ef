"""Detects rows that contain benchmark items, which would make a score on that benchmark meaningless.

Compares runs of 13 lower-case words without punctuation, as in the GPT-3 paper (arXiv 2005.14165, appendix C). An item with
fewer words has no such run and is not covered; the number of such items is reported. Paraphrases and translations are missed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tunesmith.errors import DataError, Problem
from tunesmith.io.rows import read_rows
from tunesmith.quality.words import run_hashes, words
from tunesmith.recipe import OverlapSection

RUN = 13  # words


class Overlap:
    """The benchmarks that the recipe names; a few megabytes, built once per process."""

    def __init__(self, settings: OverlapSection) -> None:
        self.items: dict[str, int] = {}
        self.too_short: dict[str, int] = {}
        self._runs: dict[str, np.ndarray] = {}
        for name, path in settings:
            if path is not None:
                self._read(name, _ITEMS[name](Path(path)))

    def _read(self, name: str, items: Iterator[str]) -> None:
        runs = [run_hashes(words(item), RUN) for item in items]
        self.items[name], self.too_short[name] = len(runs), sum(len(found) == 0 for found in runs)
        self._runs[name] = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)

    def check(self, text: str) -> dict[str, int]:
        """For each benchmark, the number of the text's runs that it contains; benchmarks without any are omitted."""
        if not self._runs:
            return {}
        found = np.unique(run_hashes(words(text), RUN))
        counts = {name: _shared(found, runs) for name, runs in self._runs.items()}
        return {name: count for name, count in counts.items() if count}


def _shared(found: np.ndarray, runs: np.ndarray) -> int:
    """How many of `found` are among the sorted `runs`."""
    if len(runs) == 0:
        return 0
    at = np.minimum(np.searchsorted(runs, found), len(runs) - 1)
    return int((runs[at] == found).sum())


def _missing(path: Path) -> DataError:
    why = "overlap between the rows and the benchmark could not be checked"
    return DataError(Problem("TS101", "no such benchmark file", str(path), why, "check data.overlap"))


def _mmlu(folder: Path) -> Iterator[str]:
    files = sorted((folder / "test").glob("*_test.csv"))
    if not files:
        raise _missing(folder / "test")
    for path in files:
        with path.open(encoding="utf-8", newline="") as handle:
            yield from (row[0] for row in csv.reader(handle) if row and row[-1] != "answer")  # some copies have a header


def _column(column: str) -> Callable[[Path], Iterator[str]]:
    def read(path: Path) -> Iterator[str]:
        if not path.is_file():
            raise _missing(path)
        for row in read_rows(path):
            text = (row.value or {}).get(column)
            if not isinstance(text, str):
                why = "overlap between the rows and the benchmark could not be checked"
                raise DataError(Problem("TS104", f"no text in {column!r}", row.where, why, "give the published file"))
            yield text

    return read


_ITEMS: dict[str, Callable[[Path], Iterator[str]]] = {
    "mmlu": _mmlu,
    "gsm8k": _column("question"),
    "humaneval": _column("prompt"),
}
