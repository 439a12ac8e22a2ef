"""Writes a line of metrics.jsonl for each optimizer step, and keeps them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tunesmith.io.atomic import append_jsonl
from tunesmith.stages.train.metrics import StepMetrics


class Recorder:
    """The steps of a training: `history` has the finished ones, including those before a resume."""

    def __init__(self, path: Path, steps: int, history: Sequence[StepMetrics] = ()) -> None:
        """`steps` is the total number of steps."""
        self.path, self.steps, self.history = path, steps, list(history)
        #: Called once a step's line is written, with the step and the total number of steps.
        self.on_step: list[Callable[[StepMetrics, int], None]] = []
        self._begun = time.perf_counter()

    def start(self) -> None:
        """Start the timer of the next step."""
        self._begun = time.perf_counter()

    def exclude_from_timing(self, seconds: float) -> None:
        """Exclude the last `seconds` from the time of the step."""
        self._begun += seconds

    @property
    def elapsed(self) -> float:
        """Seconds of the step so far."""
        return time.perf_counter() - self._begun

    def record(
        self,
        values: Mapping[str, float],
        tokens: tuple[int, int, int],
        figures: Mapping[str, float],
        seconds: float | None = None,
    ) -> None:
        """Record a step: `values` has loss, grad_norm and learning_rate; `tokens` counts real, computed and labelled ones.

        `seconds` overrides this process's own timing of the step.
        """
        taken = self.elapsed
        self.start()
        real, computed, labelled = tokens
        metrics = StepMetrics(
            step=len(self.history) + 1,
            loss=float(values["loss"]),
            grad_norm=float(values["grad_norm"]),
            learning_rate=float(values["learning_rate"]),
            tokens=real,
            computed_tokens=computed,
            labelled_tokens=labelled,
            seconds=taken if seconds is None else seconds,
            figures=dict(figures),
        )
        self.history.append(metrics)
        append_jsonl(self.path, metrics.as_dict())
        for call in self.on_step:
            call(metrics, self.steps)
