"""The cache folder: what tunesmith fetches or computes once for all runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TUNESMITH_CACHE`, else `tunesmith` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    named = os.environ.get("TUNESMITH_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tunesmith"
