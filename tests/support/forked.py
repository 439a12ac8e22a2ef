"""Processes forked from a server that has imported the libraries; they are used like those of subprocess."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
#: Of each process that has ended. They are no children of the tests' process, whose times do not include them.
CPU_SECONDS: list[float] = []


@cache
def _server(preload: str) -> subprocess.Popen[str]:
    """The server, started on first use; it ends when this process closes its input, at the latest by ending."""
    command = [sys.executable, "-m", "tests.support.forkserver"]
    environment = {**os.environ, "LD_PRELOAD": preload} if preload else None
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


class Forked:
    """`python -m MODULE ARGUMENTS` in a copy of the server; `path` has further folders to find modules in."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, cwd: Path = ROOT, path: Sequence[Path] = (), **environment: str
    ) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="forked-"))
        self.returncode: int | None = None
        files = {name: str(self._scratch / name) for name in ("stdout", "stderr", "status")}
        for name in ("stdout", "stderr"):  # pipes, since a limit on files must not stop error messages
            os.mkfifo(files[name])
        self._pipes = [os.open(files[name], os.O_RDONLY | os.O_NONBLOCK) for name in ("stdout", "stderr")]
        self._printed = [bytearray(), bytearray()]
        request = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "path": [*map(str, path)], **files}
        server = _server(environment.get("LD_PRELOAD", ""))
        if server.stdin is None or server.stdout is None:
            raise AssertionError("the pipes were asked for")
        server.stdin.write(json.dumps(request | {"environment": {**os.environ, **environment}}) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
        self.wait()
        self.close()

    def close(self) -> None:
        """Give back its pipes and its folder, once it has ended."""
        for pipe in self._pipes:
            os.close(pipe)
        shutil.rmtree(self._scratch)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        status = self._scratch / "status"
        if self.returncode is None:
            ended = status.exists()
            self._read()
            if ended:
                code, seconds = status.read_text(encoding="ascii").split()
                self.returncode = int(code)
                CPU_SECONDS.append(float(seconds))
        return self.returncode

    def _read(self) -> None:
        """Take what is in the pipes, so that they do not fill up."""
        for pipe, printed in zip(self._pipes, self._printed, strict=True):
            with contextlib.suppress(BlockingIOError):
                while content := os.read(pipe, 1 << 16):
                    printed.extend(content)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        begun = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - begun > timeout:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.002)
        return self.returncode or 0

    def communicate(self) -> tuple[str, str]:
        """What it has printed to stdout and stderr, once it has ended."""
        self.wait()
        return self.communicated()

    def communicated(self) -> tuple[str, str]:
        """What it has printed to stdout and stderr until now."""
        out, error = (printed.decode("utf-8", errors="replace") for printed in self._printed)
        return out, error

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def ran(
    module: str, arguments: Sequence[str], *, cwd: Path = ROOT, path: Sequence[Path] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """A finished process and what it printed."""
    with Forked(module, arguments, cwd=cwd, path=path, **environment) as process:
        out, error = process.communicate()
    return subprocess.CompletedProcess([module, *arguments], process.returncode or 0, out, error)
