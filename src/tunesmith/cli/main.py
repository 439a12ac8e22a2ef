"""The entry point: runs a command, tells its errors, and leaves with its exit code.

Exit codes: 0 done, 2 the user can mend it (a readable error), 130 and 143 stopped by SIGINT and SIGTERM. Nothing here imports
torch: a stage does.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from tunesmith.cli.commands import app
from tunesmith.cli.render import show_problems, stderr
from tunesmith.errors import ERRORS_TO, EndedError, Problem, TunesmithError, error_as_json
from tunesmith.hardware.allocators import grow_segments, keep_few_products


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    # bitsandbytes asks for an optional package of faster CPU kernels each time it loads without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    grow_segments()
    keep_few_products()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal's encoding lacks
    told_to = os.environ.pop(ERRORS_TO, None)
    try:
        app()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except EndedError as error:
        code = error.exit_code
    except TunesmithError as error:
        if told_to is None:
            show_problems(error.problems)
        else:
            Path(told_to).write_text(json.dumps(error_as_json(error)), encoding="utf-8")
        code = 2
    except OSError as error:
        code = _told(error)
    except KeyboardInterrupt:
        stderr().print("interrupted", style="bold red")
        code = 130
    else:
        code = 0
    sys.exit(_flushed(code))


#: What an operating system refuses that is no fault of the program: space, rights, a device.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG}


def _told(error: OSError) -> int:
    """The exit code of what the operating system has refused, which is told; another error is raised again."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE  # as the shell has it: who read has left
    if error.errno not in _REFUSED:
        raise error
    where = str(error.filename or "standard output")
    why, fix = "what was to be read or written there is missing", "make room, change the rights, or name another place"
    show_problems([Problem("TS013", str(error.strerror), where, why, fix)])
    return 2


def _flushed(code: int) -> int:
    """The exit code once all is written, of which Python would complain later."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _told(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in it is lost, and said to be
    return code
