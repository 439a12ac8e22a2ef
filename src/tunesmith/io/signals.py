"""Signals for a while: SIGINT and SIGTERM handled, and foreign code ended after so much time; then all is as it was before."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In the block `handler` gets both signals; outside the main thread, which alone may ask for it, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, earlier)


#: Seconds of computing that a template may take for one row: real ones take less than a thousandth of one.
TEMPLATE_SECONDS = 5.0


class TooLongError(Exception):
    """What was begun has taken more than its time."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """End the block with TooLongError after so many seconds of this process's own computing (POSIX, in the main thread).

    Blocks do not nest. Python code is ended wherever it is; a single call into C only once it returns.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
