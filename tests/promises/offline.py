"""Runs the command line with the network cut: an attempt to connect, or to look up a name, is noted in a file and refused.

python -m tests.promises.offline ATTEMPTS -- run recipe.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tunesmith.cli import main

CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"}


def cut(path: Path) -> None:
    """From here on, in this process; those that it starts are the caller's to cut."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS:
            with path.open("a", encoding="utf-8") as handle:
                handle.write(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}\n")
            raise OSError("the network is cut")

    sys.addaudithook(hook)


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
    sys.argv = ["tunesmith", *sys.argv[3:]]
    main()
