"""The entry point: runs a command, reports its errors, and exits with its exit code.

Exit codes: 0 success, 2 an error the user can fix (with a readable message), 130 and 143 stopped by SIGINT and SIGTERM.
Nothing here imports torch; the stages do.
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
from tunesmith.hardware.allocators import grow_segments, keep_few_gemms


def main() -> NoReturn:
    """Run the command line and exit with its exit code."""
    # Each time bitsandbytes loads without an optional package of faster CPU kernels, it logs a hint to install it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    grow_segments()
    keep_few_gemms()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal's encoding lacks
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


#: Operating-system errors that are not a bug: disk space, permissions, a device.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG}


def _told(error: OSError) -> int:
    """Report an error in _REFUSED and return its exit code; any other error is raised again."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE  # as in a shell: the reader has closed the pipe
    if error.errno not in _REFUSED:
        raise error
    where = str(error.filename or "standard output")
    why, fix = "data could not be read or written there", "free disk space, fix the permissions, or choose another path"
    show_problems([Problem("TS013", str(error.strerror), where, why, fix)])
    return 2


def _flushed(code: int) -> int:
    """The exit code after flushing stdout; without this, Python reports a failed flush at shutdown."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _told(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the buffer is lost, and reported as lost
    return code
