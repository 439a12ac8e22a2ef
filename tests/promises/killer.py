"""Runs the command line until a chosen file call of a savepoint's write, and acts there.

    python -m tests.promises.killer kill N -- train runs/x     SIGKILL before the N-th call, counted from 1
    python -m tests.promises.killer full N -- train runs/x     no file may grow from the N-th call on
    python -m tests.promises.killer count 0 -- train runs/x    prints the calls of the third write

A name instead of N means the first call of that function.

The interpreter's profile hook sees each call of a C function once metrics.jsonl has been opened; the code under test is
unchanged.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from types import FrameType
from typing import Any

from tests.promises.hooks import when_metrics_open
from tunesmith.cli.main import main
from tunesmith.stages.train.savepoints import Savepoints

#: C functions that change the disk or read back a save.
CALLS = {"mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "chmod", "serialize_file", "statvfs"}


class Killer:
    """Counts the calls while `Savepoints.write` runs."""

    def __init__(self, what: str, which: str) -> None:
        self.what, self.which = what, which
        self.inside = False
        self.calls: list[str] = []
        self.writes = 0
        self.done = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code is Savepoints.write.__code__:
            self._boundary(event)
        if not self.inside or event != "c_call" or argument.__name__ not in CALLS:
            return
        self.calls.append(argument.__name__)
        if self.which not in {str(len(self.calls)), argument.__name__} or self.done:
            return
        self.done = True
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _boundary(self, event: str) -> None:
        """The write begins or ends."""
        if event == "call":
            self.inside = True
            self.writes += 1
            if self.what == "count":
                self.calls.clear()
        elif event == "return":
            self.inside = False
            if self.what == "count" and self.writes == 3:
                print("calls", *self.calls, flush=True)
                sys.setprofile(None)


if __name__ == "__main__":
    killer = Killer(sys.argv[1], sys.argv[2])
    when_metrics_open(lambda: sys.setprofile(killer))  # earlier, it would only slow down startup
    sys.argv = ["tunesmith", *sys.argv[4:]]
    main()
