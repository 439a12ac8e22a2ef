"""Runs the command line with limited memory: once metrics.jsonl is opened, tensors may take only BYTES more.

    LD_PRELOAD=allocator.so python -m tests.promises.limited BYTES -- train runs/x
    LD_PRELOAD=allocator.so python -m tests.promises.limited count -- train runs/x    prints the peak, without a limit

The preloaded allocator (allocator.c) enforces the limit: an allocation that does not fit fails, and torch raises its own error.
"""

from __future__ import annotations

import atexit
import ctypes
import sys

from tests.promises.hooks import when_metrics_open
from tunesmith.cli.main import main

ALLOCATOR = ctypes.CDLL(None)
for name in ("tunesmith_limit", "tunesmith_peak"):
    getattr(ALLOCATOR, name).restype = ctypes.c_long
    getattr(ALLOCATOR, name).argtypes = [ctypes.c_long] if name == "tunesmith_limit" else []


def limit(more: str) -> None:
    """Set the limit from now on; with `count`, set none and print the peak at the end."""
    begun = ALLOCATOR.tunesmith_limit(0 if more == "count" else int(more))
    if more == "count":
        atexit.register(lambda: print("grew", ALLOCATOR.tunesmith_peak() - begun))


if __name__ == "__main__":
    bytes_more = sys.argv[1]
    when_metrics_open(lambda: limit(bytes_more))
    sys.argv = ["tunesmith", *sys.argv[3:]]
    main()
