"""SIGINT and SIGTERM during training: the step is finished and saved first; a second signal exits at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

from tunesmith.io.signals import handling


class StopSignals:
    """Inside the block, the first signal is only recorded in `asked`; outside the main thread, signals are left alone."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._handled = handling(self._note)

    def __enter__(self) -> Self:
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._handled.__exit__(kind, value, trace)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = signal.Signals(number)
