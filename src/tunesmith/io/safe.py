"""The border where foreign model folders are opened: safetensors only, nothing outside the folder, no code.

`check_model_folder` looks at names and JSON alone, before any model library sees the folder. transformers itself
follows a shard index to `../x.safetensors`, and `trust_remote_code=False` has been overridden by a model's own
config (CVE-2026-5241), so both are refused here.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, Problem

_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".joblib")
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))  # how a pickle begins, from protocol 2 on


def _problem(code: str, what: str, where: Path, fix: str) -> Problem:
    why = "a model folder is foreign input: it must not run code or reach outside itself"
    return Problem(code, what, str(where), why, fix)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(_problem("TS202", f"cannot be read as JSON: {error}", path, "fetch the file again")) from error


def _outside(folder: Path, name: Any) -> bool:
    return not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file()


def _index_problems(folder: Path) -> Iterator[Problem]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            yield _problem("TS202", "the shard index has no weight_map", index, "fetch the model again")
            continue
        for name in sorted({str(value) for value in weight_map.values()}):
            if _outside(folder, name):
                what = f"the shard index names {name!r}, which is not a file of this folder"
                yield _problem("TS205", what, index, "use a complete copy of the model whose index names its own shards")


def _header_problem(path: Path) -> Problem | None:
    """A safetensors file begins with the length of its JSON header (8 bytes, little endian) and the header."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            return _problem("TS202", "not a whole safetensors file", path, "fetch the file again")
        try:
            json.loads(handle.read(length))
        except (ValueError, RecursionError):
            return _problem("TS202", "the safetensors header is not JSON", path, "fetch the file again")
    return None


def _entry_problems(folder: Path) -> Iterator[Problem]:
    root = folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _hub_link(path) and root not in path.resolve().parents:
            yield _problem("TS205", "a link that leads out of the folder", path, "copy the file into the folder")
        if path.suffix in _WEIGHTS:
            fix = "convert the weights to safetensors, or delete the file"
            yield _problem("TS203", f"{path.suffix} weights can run code when opened", path, fix)
        elif path.is_file() and _is_pickle(path):
            yield _problem("TS203", "a pickle under another name, which can run code when opened", path, "delete the file")
        if path.suffix == ".safetensors" and path.is_file() and (problem := _header_problem(path)):
            yield problem


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle by its content, or an archive with one, as torch.save writes it."""
    with path.open("rb") as handle:
        if handle.read(2) in _PICKLES and path.suffix != ".safetensors":  # there it may be a length
            return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _hub_link(path: Path) -> bool:
    """The hub's cache links snapshots/<commit>/<file> to ../../blobs/<sha>: a link of its own making."""
    target = path.resolve()
    return target.parent.name == "blobs" and path.parent.parent.name == "snapshots"


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise ModelError with every reason not to open `folder`; `weights=False` accepts one without weights.

    Covered: a missing folder or config, pickles under any name, `auto_map` (code in the folder), a shard index or a link
    that leads outside, torn safetensors headers. Not covered: what a template does when it is rendered.
    """
    if not folder.is_dir():
        fix = "check the path; built in is smollm2-135m-instruct"
        raise ModelError(_problem("TS201", "the model folder does not exist", folder, fix))
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(_problem("TS202", "no config.json", folder, "give the folder that save_pretrained wrote"))
    problems = list(_entry_problems(folder))
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        value = _json(path) if path.is_file() else {}
        if not isinstance(value, dict):
            problems.append(_problem("TS202", "must hold a JSON object", path, "fetch the file again"))
        elif value.get("auto_map"):
            fix = "use a model of an architecture that transformers has built in"
            problems.append(_problem("TS204", "auto_map asks to run code from the model folder", path, fix))
    problems += _index_problems(folder)
    if weights and not list(folder.glob("*.safetensors")):
        problems.append(_problem("TS202", "no .safetensors weights", folder, "convert the weights to safetensors"))
    if problems:
        raise ModelError(problems)
