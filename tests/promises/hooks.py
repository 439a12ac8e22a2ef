"""A hook for the moment when training in a separate process is about to begin, with model and libraries loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def when_metrics_open(call: Callable[[], object]) -> None:
    """Call once, on the thread that opens metrics.jsonl for the first time."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not begun and "metrics.jsonl" in str(arguments[0]):
            begun.append(True)
            call()

    begun: list[bool] = []
    sys.addaudithook(hook)
