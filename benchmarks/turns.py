"""What the sides of the speed benchmarks share, including LLaMA-Factory's: the row order and the callback for turns."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from tunesmith.hardware.memory import PeakMemory


def in_order(rows: Dataset, lengths: Sequence[int], batch: int, seed: int) -> Dataset:
    """The rows in the engine's order, sorted by length within a step, which minimises padding in micro-batches."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = (drawn[start : start + batch] for start in range(0, len(drawn), batch))
    return rows.select([row for step in steps for row in sorted(step, key=lambda row: -lengths[row])])


class Turns(TrainerCallback):
    """Waits before each turn for a line with its number of steps, and answers with their measurements."""

    def __init__(self, meter: PeakMemory) -> None:
        self.meter = meter
        self.left = 0
        self.begun = 0.0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tokens = self.labelled = 0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries may print; only answers go to the original stdout

    def answer(self, **values: Any) -> None:
        """Write one line."""
        print(json.dumps(values), file=self.answers, flush=True)

    def note(self, loss: float, norm: float, tokens: int = 0, labelled: int = 0) -> None:
        """Record the values of a step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.tokens += tokens
        self.labelled += labelled

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Record what TRL logs after each step; the engine logs nothing."""
        if logs is not None and "grad_norm" in logs:
            self.note(logs["loss"], float(logs["grad_norm"]))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait if the turn is over. Work between two steps, such as collating, counts towards the turn."""
        if self.left == 0:
            if self.begun:
                seconds = time.perf_counter() - self.begun
                peak = self.meter.peak_bytes()
                counts = {"computed_tokens": self.tokens, "labelled_tokens": self.labelled}
                self.answer(seconds=seconds, losses=self.losses, grad_norms=self.norms, peak_memory_bytes=peak, **counts)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            self.left = int(line)
            self.losses, self.norms, self.tokens, self.labelled = [], [], 0, 0
            if not self.begun:
                self.meter.reset()
            self.begun = time.perf_counter()
        self.left -= 1
