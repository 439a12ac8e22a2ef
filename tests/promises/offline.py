"""Blocks the network for a process and its children: copied as `sitecustomize.py` into a folder on PYTHONPATH.

An attempt to connect or to look up a name is recorded in the file that TUNESMITH_ATTEMPTS names, and refused.
"""

import os
import sys
from typing import Any

CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"}


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook that sees every call of Python's sockets."""
    if event in CALLS:
        with open(os.environ["TUNESMITH_ATTEMPTS"], "a", encoding="utf-8") as handle:  # noqa: PTH123 - pathlib is not there yet
            handle.write(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}\n")
        raise OSError("the network is cut")


if "TUNESMITH_ATTEMPTS" in os.environ:
    sys.addaudithook(hook)
