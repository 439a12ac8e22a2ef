"""Keeps Python from loading code from the working folder, whose files may be untrusted, or from a hub.

`python -m` puts that folder first on the module path, and an empty or relative entry of PYTHONPATH, PATH or LD_LIBRARY_PATH
refers to it. Child processes would inherit both. Imports only modules that Python has already loaded by then.
"""

import os
import sys

_LISTS = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def leave_working_folder() -> None:
    """Remove the working folder from the module path, here and in every child process.

    An absolute entry of PYTHONPATH stays even if it is that folder: the user named it. Entries of installations stay too.
    """
    if not sys.flags.safe_path and sys.path:
        del sys.path[0]  # the folder of `-m`, or of the script
    for name in _LISTS:
        _only_absolute(name)
    os.environ["PYTHONSAFEPATH"] = "1"


def leave_hub_kernels() -> None:
    """Keep libraries from downloading compiled kernels from a hub and running them.

    If the package `kernels` is installed, bitsandbytes does so on import, and transformers for some kinds of attention.
    None in `sys.modules` makes the import system treat a module as unavailable.
    """
    os.environ["USE_HUB_KERNELS"] = "0"
    sys.modules["kernels"] = None  # type: ignore[assignment]


def _only_absolute(name: str) -> None:
    value = os.environ.get(name, "")
    entries = value.split(os.pathsep)
    kept = [entry for entry in entries if os.path.isabs(entry)]
    if not value or kept == entries:
        return
    if name == "PYTHONPATH" and not sys.flags.ignore_environment:
        for entry in entries:
            if not os.path.isabs(entry) and (found := os.path.abspath(entry)) in sys.path:
                sys.path.remove(found)
    if kept:
        os.environ[name] = os.pathsep.join(kept)
    else:
        del os.environ[name]
