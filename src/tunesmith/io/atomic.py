"""The only module that commits files: a reader sees the old content or the new, never a mix, and no foreign file is lost.

A file is written next to its final name, synced, and renamed. A folder is filled under a hidden name and renamed as a whole.
A crash leaves the old content and perhaps a hidden leftover, which the next commit to the same name cleans up.

A committed folder has a manifest (`MANIFEST`) with its kind and its files. A folder is replaced only if its own manifest says
that it is of the same kind, and if it holds nothing else. Anything else at that name is refused.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tunesmith.errors import Problem, RunError

MANIFEST = ".tunesmith"  # no suffix: tools that read a model folder read its *.json

_number = itertools.count()  # distinguishes the partial files of one process
_CHUNK = 1 << 20  # bytes read per call while hashing: 1 MiB
_NAMED = 3  # number of foreign files that a message names


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
    """Flush every file and give it the default mode of a new file: safetensors writes 0600, which a server cannot read."""
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
    """Remove partial files of `path` left by processes that no longer exist."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*.partial"):
        owner = leftover.name.removesuffix(".partial").rpartition(".")[2].partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            leftover.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data` in one rename. On any error the old content stays and no leftover remains.

    Several processes may write the same file: each has its own partial file, and the last rename wins.
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
    """Replace `path` with `text` (UTF-8) in one rename."""
    write_bytes(path, text.encode("utf-8"))


def indented_json(value: Any) -> str:
    """`value` as `write_json` writes it. NaN and infinities are refused (ValueError)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON in one rename. NaN and infinities are refused (ValueError)."""
    write_text(path, indented_json(value))


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Replace `path` with one line of JSON per value, in one rename."""
    write_text(path, jsonl_text(values))


def jsonl_text(values: Iterable[Any]) -> str:
    """One line of JSON per value."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_json(path: Path) -> Any:
    """The value in a JSON file that tunesmith wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, value: Any) -> None:
    """Append one line of JSON in a single write, so that neither a reader nor a crash sees two lines interleaved."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as handle:
        handle.write(line.encode("utf-8"))


@contextlib.contextmanager
def commit_folder(final: Path, kind: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` if the block succeeds and is removed if it fails.

    An existing `final` is replaced if `check_replaceable` allows it, which is checked before and after the block. The old
    folder is moved aside, the new one takes its name, then the old one is deleted. Raises RunError if anything else is there.
    """
    final = final.resolve()
    _recover(final)
    check_replaceable(final, kind)
    final.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{final.name}.tunesmith-{os.getpid()}-{next(_number)}"
    partial, retired = final.parent / f"{mark}.partial", final.parent / f"{mark}.retired"
    partial.mkdir()
    try:
        yield partial
        write_text(partial / MANIFEST, indented_json(_manifest(partial, kind)))
        _sync_tree(partial)
        check_replaceable(final, kind)
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


def _recover(final: Path) -> None:
    """Restore what a dead process had moved aside, and remove what it had not finished."""
    for leftover in sorted(final.parent.glob(f".{glob.escape(final.name)}.tunesmith-*-*.*")):
        owner = leftover.name.rpartition(".tunesmith-")[2].partition("-")[0]
        if not owner.isdigit() or psutil.pid_exists(int(owner)):
            continue
        if leftover.suffix == ".retired" and not final.exists():
            leftover.rename(final)
        elif leftover.suffix in {".retired", ".partial"}:
            shutil.rmtree(leftover, ignore_errors=True)


def check_replaceable(final: Path, kind: str) -> None:
    """Raise RunError unless `final` is free, an empty folder, or an unchanged folder that was committed as `kind`.

    Links are followed. Call it before long work, so that the work is not wasted.
    """
    final = final.resolve()
    if not final.exists():
        standing = next((parent for parent in final.parents if parent.exists()), None)
        if standing is not None and not standing.is_dir():
            raise foreign(final, f"{standing.name} is a file, not a folder")
        return
    if not final.is_dir():
        raise foreign(final, "there is a file at this path")
    if final == Path.cwd():
        raise foreign(final, "it is the current working folder")
    if not any(final.iterdir()):
        return
    found = changes(final, kind, whole=False)  # replacing cannot lose files that are gone already
    if found:
        more = len(found) - _NAMED
        raise foreign(final, "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else ""))


def foreign(final: Path, what: str) -> RunError:
    """The error for a path that tunesmith may not replace."""
    why = "tunesmith never removes or replaces what it did not write"
    fix = "name another folder, or move your files away"
    return RunError(Problem("TS015", f"this cannot be replaced: {what}", str(final), why, fix))


def changes(folder: Path, kind: str, *, whole: bool = True) -> list[str]:
    """How a folder differs from the one committed as `kind`, in words; empty if it is byte-identical.

    `whole`: missing files count as changes too.
    """
    found = _read_manifest(folder)
    if found is None:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:_NAMED])
        return [f"it holds {held} but no intact manifest ({MANIFEST})"]
    if found["kind"] != kind:
        return [f"it is a folder of another kind ({found['kind']}, not {kind})"]
    files, here = found["files"], _entries(folder)
    names = here | set(files) if whole else here
    differences = (_difference(folder / name, name, files.get(name)) for name in sorted(names))
    return [difference for difference in differences if difference is not None]


def _difference(path: Path, name: str, wanted: dict[str, Any] | None) -> str | None:
    if wanted is None:
        return f"{name} does not belong to it"
    if name.endswith("/"):
        return None if path.is_dir() and not path.is_symlink() else f"{name} is missing"
    if not os.path.lexists(path):
        return f"{name} is missing"
    if path.is_symlink() or not path.is_file():
        return f"{name} is no longer a file"
    if path.stat().st_size != wanted["bytes"]:
        return f"{name} has another size"
    return None if sha256_file(path) == wanted["sha256"] else f"{name} was changed"


def _entries(folder: Path) -> set[str]:
    """Paths of all files and links below `folder` except its manifest; empty folders end with a slash."""
    found: set[str] = set()
    for root, folders, names in os.walk(folder):
        base = Path(root)
        links = [name for name in folders if (base / name).is_symlink()]
        found |= {(base / name).relative_to(folder).as_posix() for name in [*names, *links]}
        if base != folder and not names and not folders:
            found.add(base.relative_to(folder).as_posix() + "/")
    return found - {MANIFEST}


def _manifest(folder: Path, kind: str) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = {}
    for name in sorted(_entries(folder)):
        path = folder / name
        files[name] = {} if name.endswith("/") else {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return {"kind": kind, "digest": sha256_json([kind, files]), "files": files}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None if there is none, or if it is not exactly as tunesmith writes it."""
    try:
        text = (folder / MANIFEST).read_bytes()
        found: dict[str, Any] = json.loads(text)
        whole = text == indented_json(found).encode() and found["digest"] == sha256_json([found["kind"], found["files"]])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if whole else None


def committed_files(folder: Path) -> dict[str, str]:
    """Digests by path of the files of a folder that has just been committed, including its manifest."""
    found = _read_manifest(folder)
    if found is None:
        raise AssertionError("not a folder that was just committed")
    digests = {name: facts["sha256"] for name, facts in found["files"].items() if facts}
    return digests | {MANIFEST: sha256_file(folder / MANIFEST)}


def remove_folder(folder: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Remove a committed folder, changed or not. A folder with files that its manifest does not name is left alone.

    If the manifest cannot be read, files that end with one of `suffixes` count as named.
    """
    found, here = _read_manifest(folder), _entries(folder)
    if not here - set(found["files"]) if found else all(name.endswith(suffixes) for name in here):
        shutil.rmtree(folder, ignore_errors=True)


def empty_folder(folder: Path, names: Collection[str]) -> None:
    """Remove the entries of `folder` with these names. If it holds anything else, raises RunError and removes nothing.

    Anything added later to a committed folder inside it also counts as something else.
    """
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise foreign(folder, "it is not a folder")
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in names)
    for manifest in sorted(folder.rglob(MANIFEST)):
        found = _read_manifest(manifest.parent) or {"files": _entries(manifest.parent)}
        inside = manifest.parent.relative_to(folder).as_posix()
        strangers += [f"{inside}/{name}" for name in sorted(_entries(manifest.parent) - set(found["files"]))]
    if strangers:
        raise foreign(folder, f"it also holds {', '.join(strangers[:_NAMED])}")
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
