"""Tries a tokenizer.json in a separate process, with limits on time and memory, before it is used.

It is untrusted input that gets executed: a normaliser may turn a word into gigabytes, a pattern may search forever, and the
native parser may abort the whole process. A file that passes is remembered by its digest.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from tunesmith.errors import ModelError, Problem
from tunesmith.io.atomic import sha256_file, write_text
from tunesmith.io.cache import cache_folder

_SECONDS = 5  # of CPU time for loading, and again for the texts; the largest vocabularies take one
_MEMORY = 4 << 30  # bytes of address space
_MOST_TOKENS = 64  # per character, plus a constant


def try_tokenizer(folder: Path) -> None:
    """Raise ModelError if the folder's tokenizer.json cannot be read, or exceeds the limits in use."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    passed = cache_folder() / "tokenizers" / sha256_file(path)
    if passed.is_file():
        return
    command = [sys.executable, "-P", "-m", __name__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it exceeds the time or memory limit"]
        why = "it encodes every row"
        fix = "download the file again, or use another copy of the model"
        raise ModelError(Problem("TS216", f"the tokenizer cannot be used: {last[0].strip()[:200]}", str(path), why, fix))
    with contextlib.suppress(OSError):  # an unwritable cache is not an error
        passed.parent.mkdir(parents=True, exist_ok=True)
        write_text(passed, "")


def _texts() -> list[str]:
    """Many repeats of each printable ASCII character and of some others, and ordinary text."""
    letters = [chr(code) for code in range(32, 127)] + list("\n\t\u00e9\u00df\u4e2d\u0627\u0e01\U0001f600\ufdfa\u0301")
    mixed = 'The 3 quick, brown foxes\' jump (over) 12,345 lazy dogs -- said "he".\n' * 8
    return [*(letter * 60 for letter in letters), *(f"{'a' * 40}{letter}" for letter in letters), mixed, "".join(letters) * 4]


def _main(name: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, 2 * _SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(name)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + _SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, 2 * _SECONDS))
        for text in _texts():
            count = len(tokenizer.encode(text).ids)
            if count > _MOST_TOKENS * len(text) + 64:
                sys.exit(f"it encodes {json.dumps(text[:20])} and {len(text) - 20} more characters as {count} tokens")
    except Exception as error:  # noqa: BLE001 - an untrusted file may raise anything
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _main(sys.argv[1])
