"""Data sets of several files: which files of a folder or a hub repository hold the rows of a split.

Files are listed here and read like single files. From a data set's own description (README.md, a loading script) only the
names of its own files are used. Libraries that follow such a description open any path that it names.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tunesmith.errors import DataError, Problem, first_line
from tunesmith.io.hub import hub_errors

HUB = "hub:"  # hub:owner/name or hub:owner/name@revision

#: Split names, and the words for them in the names of files and folders.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
#: Metadata files in JSON that `datasets` saves; they hold no rows.
_TOLD = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_README = 1 << 20  # bytes of a README.md that are read

Kind = Callable[[Path], bool]


def files_of(folder: Path, split: str | None, is_rows: Kind) -> Iterator[Path]:
    """The files of a folder and its subfolders with the rows of `split` (train by default), sorted by path.

    Raises DataError if there are none, or if a link leads out of the folder.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and root not in (target := Path(os.path.realpath(path))).parents and not _in_cache(path, target):
            why = "the author of the folder could choose which of your other files are trained on"
            fix = "copy the file into the folder, or remove the link"
            raise DataError(Problem("TS101", "a link that leads out of the data folder", str(path), why, fix))
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    readme = folder / "README.md"
    described = _described(readme.read_bytes()[:_README]) if readme.is_file() else []
    return iter([folder / name for name in _of_split(names, described, split, is_rows, str(folder))])


def _in_cache(path: Path, target: Path) -> bool:
    """Whether a link belongs to the hub cache: snapshots/<commit>/... to blobs/<sha> of the same repository."""
    return target.parent.name == "blobs" and target.parent.parent / "snapshots" in path.absolute().parents


def hub_name(path: str) -> tuple[str, str | None]:
    """Name and revision of `hub:owner/name@revision`."""
    name, _, revision = path.removeprefix(HUB).partition("@")
    return name, revision or None


def hub_commit(path: str) -> str:
    """The commit that `hub:owner/name@revision` resolves to; asks the hub unless it is a commit already. Raises DataError."""
    name, revision = hub_name(path)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    return str(_info(path, name, revision).sha)


def hub_files(path: str, split: str | None, is_rows: Kind) -> Iterator[Path]:
    """The files of a hub data set with the rows of `split`, each fetched only when it is reached. Raises DataError."""
    name, revision = hub_name(path)
    info = _info(path, name, revision)
    names = sorted(each.rfilename for each in info.siblings or [])
    readme = _fetched(path, name, "README.md", info.sha) if "README.md" in names else None
    described = _described(readme.read_bytes()[:_README]) if readme else []
    wanted = _of_split(names, described, split, is_rows, path)
    return (_fetched(path, name, each, info.sha) for each in wanted)


def _info(path: str, name: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision)
    except hub_errors() as error:
        raise _unreachable(path, error) from error


def _fetched(path: str, name: str, file: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
    except hub_errors() as error:
        raise _unreachable(f"{path}/{file}", error) from error


def _unreachable(path: str, error: Exception) -> DataError:
    why, fix = "there is nothing to train on", "check the name and the network, or name a commit after @"
    return DataError(Problem("TS101", f"cannot reach the data set: {first_line(error)[:200]}", path, why, fix))


def _described(readme: bytes) -> list[dict[str, Any]]:
    """What a README.md's front matter lists under `configs`; empty if it is not in the hub's form."""
    found = re.match(r"---\s*\n(.*?)\n---", readme.decode("utf-8", "replace"), re.DOTALL)
    try:
        value = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return []
    configs = value.get("configs") if isinstance(value, dict) else None
    return [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []


def _of_split(
    names: Sequence[str], described: Sequence[Mapping[str, Any]], split: str | None, is_rows: Kind, where: str
) -> list[str]:
    """The names of the split's files: from the data set's description if it lists its files, else from their names."""
    rows = [name for name in names if is_rows(Path(name)) and PurePosixPath(name).name not in _TOLD and "/." not in f"/{name}"]
    if not rows:
        why = "there is nothing to train on"
        raise DataError(Problem("TS101", "no data files found", where, why, "check the path, or name a file of rows"))
    parts = _by_description(rows, described, where) or _by_name(rows)
    if (found := parts.get(split or "train")) is None:
        fix = f"set `split` to one of: {', '.join(sorted(parts)[:20])}"
        raise DataError(Problem("TS101", f"no split {split or 'train'!r}", where, "other rows would be read", fix))
    return found


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """File names by split; if no name gives a split, all are `train`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        sharded = re.search(r"([^/]+)-\d{5}-of-\d{5}", name)
        if sharded and sharded[1] != "data":  # the hub's naming: train_sft-00000-of-00003.parquet
            parts.setdefault(sharded[1], []).append(name)
            continue
        words = re.split(r"[^a-z0-9]+", name.lower())
        for split, calls in _SPLITS.items():
            if any(word in calls for word in words):
                parts.setdefault(split, []).append(name)
                break
    return parts or {"train": list(names)}


def _by_description(names: Sequence[str], described: Sequence[Mapping[str, Any]], where: str) -> dict[str, list[str]]:
    """File names by split from the only or the default configuration; empty if none lists files."""
    listed = [each for each in described if each.get("data_files")]
    chosen = [each for each in listed if each.get("default") is True or each.get("config_name") == "default"] or listed
    if len(chosen) > 1:
        several = ", ".join(name[:40] for each in chosen[:20] if isinstance(name := each.get("config_name"), str))
        why, fix = "rows of different kinds would be mixed", "download one configuration, and name its files in data.train"
        raise DataError(Problem("TS101", f"the data set has several configurations ({several})", where, why, fix))
    parts: dict[str, list[str]] = {}
    for split, pattern in (pair for each in chosen for pair in _patterns(each["data_files"])):
        matching = fnmatch.filter(names, pattern.replace("**/", "*").removeprefix("./"))
        parts[split] = sorted({*parts.get(split, []), *matching})
    return {split: found for split, found in parts.items() if found}


def _patterns(entries: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) pairs from `data_files`: one pattern, several, or several per split."""
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if isinstance(split, str) and isinstance(pattern, str):
                yield split, pattern
