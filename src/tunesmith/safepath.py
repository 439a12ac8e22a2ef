"""No code is taken from the folder that the command is called in, whose files may be anybody's, and none from a hub.

`python -m` puts that folder first on the module path, an empty or relative entry of PYTHONPATH, PATH or LD_LIBRARY_PATH means
it, and each process that is started would do so again. Imports nothing but what Python has loaded by then.
"""

import os
import sys

_LISTS = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def leave_working_folder() -> None:
    """Take the working folder off the module path, here and in every process that this one starts.

    An absolute entry of PYTHONPATH stays, also where it is that folder: it was named. What an installation added stays too.
    """
    if not sys.flags.safe_path and sys.path:
        del sys.path[0]  # the folder of `-m`, or of the script
    for name in _LISTS:
        _only_absolute(name)
    os.environ["PYTHONSAFEPATH"] = "1"


def leave_hub_kernels() -> None:
    """Keep libraries from fetching compiled kernels from a hub and running them.

    bitsandbytes does so as it is imported, transformers for some kinds of attention, where the package `kernels` is there.
    None in `sys.modules` is how the import system says that a module is not to be had.
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
