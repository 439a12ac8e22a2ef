"""A process that has imported the libraries and forks copies of itself, which start in milliseconds instead of seconds.

    python -m tests.support.forkserver      reads one request per line, as JSON, and answers with the copy's process number

A copy runs a module as `python -m` would. When it has ended, the file `status` that was named in the request has its exit code
and CPU seconds.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

PRELOADED = ("peft", "bitsandbytes", "tunesmith.cli.commands", "tunesmith.stages.prepare", "tunesmith.stages.train")


def reap(running: dict[int, Path]) -> None:
    """Write the exit codes of the copies that have ended (negative for a signal) and their CPU seconds."""
    while running:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        path = running.pop(pid)
        told = f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}"
        path.with_suffix(".new").write_text(told, encoding="ascii")
        path.with_suffix(".new").rename(path)


def become(request: dict[str, Any]) -> None:
    """Turn this copy into the process that was asked for."""
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    # The streams of the server are those of a file or a terminal; these are pipes.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.path[:0] = request["path"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def ended_like_a_script(request: dict[str, Any]) -> int:
    """The exit code of the process, after what it registered for its end.

    The interpreter is not torn down: that would touch, and so copy, all that was imported, which takes two seconds.
    """
    code: Any = 0
    try:
        become(request)
    except SystemExit as left:
        code = left.code or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:  # noqa: BLE001 - told as the interpreter does
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code if isinstance(code, int) else 1


def serve() -> None:
    """Fork a copy for each request, until standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the tests
    gc.collect()
    gc.freeze()
    running: dict[int, Path] = {}
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    while True:
        reap(running)
        if not select.select([requests], [], [], 0.005)[0]:
            continue
        line = requests.readline()
        if not line:
            return
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            requests.close()
            os._exit(ended_like_a_script(request))
        running[pid] = Path(request["status"])
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
