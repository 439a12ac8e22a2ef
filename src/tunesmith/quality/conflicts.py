"""Different answers to the same prompt, which give contradictory training signals."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conflict:
    """Rows with the same prompt: the number of the first row with each distinct answer, in order, and the row count."""

    numbers: tuple[int, ...]
    rows: int


class Conflicts:
    """Collects prompts and answers as digests: 20 bytes per row."""

    def __init__(self) -> None:
        self._prompts, self._answers = array("Q"), array("Q")
        self._numbers = array("I")

    def add(self, number: int, prompt_digest: str, answer_digest: str) -> None:
        """Store a row under its number; of the hex digests only the first 16 digits (64 bits) are kept."""
        self._prompts.append(int(prompt_digest[:16], 16))
        self._answers.append(int(answer_digest[:16], 16))
        self._numbers.append(number)

    def report(self) -> list[Conflict]:
        """Prompts with more than one answer, in order of their first row."""
        prompts, answers = np.frombuffer(self._prompts, np.uint64), np.frombuffer(self._answers, np.uint64)
        order = np.argsort(prompts, kind="stable")
        ordered = prompts[order]
        edges = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]) if len(order) else np.zeros(1, np.int64)
        several = np.flatnonzero(np.diff(edges) > 1)  # most prompts occur once
        found = []
        for low, high in zip(edges[several].tolist(), edges[several + 1].tolist(), strict=True):
            rows = order[low:high]
            _, first = np.unique(answers[rows], return_index=True)
            if len(first) > 1:
                found.append((int(rows[0]), Conflict(tuple(self._numbers[int(rows[i])] for i in sorted(first)), len(rows))))
        return [conflict for _, conflict in sorted(found, key=lambda pair: pair[0])]
