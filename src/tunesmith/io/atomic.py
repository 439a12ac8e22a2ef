"""The one module that commits files: a reader sees the old content or the new, never a part.

A file is written beside its final name, synced, and renamed; a folder is filled under a hidden name and
renamed whole. A crash leaves the old content and perhaps a hidden `.partial` leftover, which the next commit of
the same name removes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

_number = itertools.count()  # tells partial files of one process apart
_CHUNK = 1 << 20  # bytes read at a time while hashing: 1 MiB


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the platform allows opening a folder (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Flush every file, and give it the mode of an ordinary new file: safetensors writes 0600, which no server reads."""
    umask = os.umask(0)
    os.umask(umask)
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            with path.open("rb+") as handle:
                os.fsync(handle.fileno())
            path.chmod(0o666 & ~umask)
        sync_folder(Path(root))


def _remove_abandoned(path: Path) -> None:
    """Remove partial files of `path` that processes left which are no more."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*.partial"):
        owner = leftover.name.removesuffix(".partial").rpartition(".")[2].partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            leftover.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename; on any error the old content stays and nothing is left beside it.

    Several processes may write the same file: each has a partial file of its own, and the last rename wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.parent / f".{path.name}.{os.getpid()}-{next(_number)}.partial"
    try:
        with partial.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one rename."""
    write_bytes(path, text.encode("utf-8"))


def indented_json(value: Any) -> str:
    """`value` as `write_json` writes it. NaN and infinities are refused (ValueError)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON in one rename. NaN and infinities are refused (ValueError)."""
    write_text(path, indented_json(value))


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Replace `path` by one line of JSON for each value, in one rename."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json(path: Path) -> Any:
    """The value in a JSON file that tunesmith wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, value: Any) -> None:
    """Append one line of JSON in a single write, so that a reader or a crash never sees two lines mixed."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as handle:
        handle.write(line.encode("utf-8"))


@contextlib.contextmanager
def commit_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the block ends well, and vanishes when it does not.

    An existing `final` is replaced: it is moved aside, the new folder takes its name, then the old one is deleted.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.partial"
    retired = final.parent / f".{final.name}.retired"
    for leftover in (partial, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        if final.exists():
            final.rename(retired)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not final.exists():
            retired.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(retired, ignore_errors=True)
