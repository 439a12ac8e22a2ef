"""What the user sees while a model trains: a progress bar with loss, tokens/s and time left, or plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tunesmith.stages.train.metrics import StepMetrics

_LOG_EVERY = 15.0  # seconds between lines where the output is not a terminal


class TrainProgress:
    """Shows each step: on a terminal in a progress bar, elsewhere as a line every 15 seconds and at the end."""

    def __init__(self, label: str, steps: int, console: Console, done: Sequence[StepMetrics] = ()) -> None:
        self.label, self.steps, self.console = label, steps, console
        self.tokens, self.done = 0, len(done)
        self.started = self.last_line = time.perf_counter()
        columns = (
            TextColumn("{task.description:>6}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, expand=True)
        self.task = self.bar.add_task(label, total=steps, completed=self.done, loss="-", speed="-")

    def __enter__(self) -> Self:
        self.started = self.last_line = time.perf_counter()
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def step(self, metrics: StepMetrics, steps: int) -> None:
        """Show one optimizer step."""
        self.tokens += metrics.tokens
        now = time.perf_counter()
        elapsed = now - self.started
        speed = f"{self.tokens / elapsed:.0f}"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=metrics.step, loss=f"{metrics.loss:.3f}", speed=speed)
        elif now - self.last_line >= _LOG_EVERY or metrics.step == steps:
            self.last_line = now
            left = elapsed / (metrics.step - self.done) * (steps - metrics.step)
            self.console.print(
                f"{self.label}: step {metrics.step}/{steps}  loss {metrics.loss:.3f}  {speed} tok/s  {left:.0f} s left",
            )
