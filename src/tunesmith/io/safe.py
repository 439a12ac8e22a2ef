"""Safe opening of untrusted model folders: safetensors only, nothing outside the folder, no code execution.

`check_model_folder` checks file names, types and sizes, JSON files and the headers of weights before any model library sees
the folder. It looks for everything that such a library follows beyond the requested file. transformers follows a shard index
to `../x.safetensors` and an adapter_config.json to another model, and fetches attention kernels that config.json names.
`trust_remote_code=False` has been overridden by a model's own config (CVE-2026-5241).
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, Problem
from tunesmith.io.tensors import Stored, read_header

_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".joblib")
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))  # first bytes of a pickle, from protocol 2 on
#: Files that libraries read from a folder, and their maximum plausible bytes. Vocabularies are the largest text files.
_LIMITS = {".json": 64 << 20, ".jinja": 1 << 20, ".model": 256 << 20, ".txt": 256 << 20}
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # their keys are vocabulary entries, not settings
#: Allowed implementations of attention and experts: those in transformers itself. It looks up other names on the hub.
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SIZE = re.compile(r"num_\w*(layers|heads|experts)|n_(layer|head|embd|positions)|(hidden|intermediate|vocab)_size|head_dim")
_MOST_LAYERS, _MOST = 10_000, 1 << 40

_checked: dict[tuple[str, bool], tuple[Any, ...]] = {}


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise ModelError with every reason not to open `folder`; `weights=False` accepts a folder without weights.

    Covered: a missing folder or config; pickles under any name; `auto_map` (code in the folder) in any settings file; a shard
    index, a link or a setting that leads outside; an adapter that names another model; kernels from a hub; entries that are
    not files or are far too large; invalid JSON; impossible model sizes; truncated or overlapping weights. Not covered: what
    a template does when it is rendered, and whether the weights match the config (models/fits.py).
    """
    if not folder.is_dir():
        fix = "check the path; the built-in model is smollm2-135m-instruct"
        raise ModelError(_problem("TS201", "the model folder does not exist", folder, fix))
    entries = sorted(_entries(folder))
    key, state = (str(folder.resolve()), weights), tuple((str(path), _stamp(path)) for path in entries)
    if _checked.get(key) == state:
        return
    problems = [problem for path in entries for problem in _entry_problems(path, folder)]
    if problems:
        raise ModelError(problems)
    if not (folder / "config.json").is_file():
        raise ModelError(_problem("TS202", "no config.json", folder, "give the folder that save_pretrained wrote"))
    for path in filter(Path.is_file, entries):
        if path.suffix == ".json":
            problems += _settings_problems(path)
        elif path.suffix == ".safetensors":
            problems += _weight_problems(path)
    problems += _index_problems(folder)
    if weights and not list(folder.glob("*.safetensors")):
        problems.append(_problem("TS202", "no .safetensors weights", folder, "convert the weights to safetensors"))
    if problems:
        raise ModelError(problems)
    _checked[key] = state


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Dtypes and shapes of all tensors of a checked model folder; only the files of its shard index if it has one."""
    index = folder / "model.safetensors.index.json"
    named = (
        set(_json(index)["weight_map"].values()) if index.is_file() else {path.name for path in folder.glob("*.safetensors")}
    )
    return {name: each for file in sorted(named) for name, each in read_header(folder / file).items()}


def _problem(code: str, what: str, where: Path, fix: str) -> Problem:
    why = "a model folder is untrusted input: it must not run code, reach outside itself, or fail in the middle of a run"
    return Problem(code, what, str(where), why, fix)


def _entries(folder: Path) -> Iterator[Path]:
    """The entries of the folder, and of the only subfolder that tokenizers read."""
    yield from folder.iterdir()
    yield from folder.glob("additional_chat_templates/*")


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.lstat()
    return status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(_problem("TS202", f"cannot be read as JSON: {error}", path, "download the file again")) from error


def _entry_problems(path: Path, folder: Path) -> Iterator[Problem]:
    """Problems of an entry: its link target and its type, and for a file also its content."""
    if path.is_symlink() and not _hub_link(path) and folder.resolve() not in Path(os.path.realpath(path)).parents:
        yield _problem("TS205", "a link that leads out of the folder", path, "copy the file into the folder")
        return
    try:
        mode = path.stat().st_mode
    except OSError as error:
        yield _problem("TS211", f"cannot be opened: {error.strerror}", path, "copy the folder again")
        return
    if stat.S_ISREG(mode):
        yield from _file_problems(path)
    elif not stat.S_ISDIR(mode) or path.suffix in {*_LIMITS, ".safetensors"}:
        yield _problem("TS211", "not a file", path, "put the file there, or remove it")


def _file_problems(path: Path) -> Iterator[Problem]:
    """Problems of a file: its name, its size and its first bytes."""
    if path.name == "adapter_config.json":
        fix = "name the base model; `tunesmith export` turns an adapter that tunesmith trained into a full model"
        yield _problem("TS213", "an adapter, which would be loaded onto any model that it names", path, fix)
    if path.suffix in _WEIGHTS:
        fix = "convert the weights to safetensors, or delete the file"
        yield _problem("TS203", f"{path.suffix} weights can run code when opened", path, fix)
    elif _is_pickle(path):
        yield _problem("TS203", "a pickle under another name, which can run code when opened", path, "delete the file")
    elif path.stat().st_size > (limit := _limit(path)):
        yield _problem("TS211", f"larger than {limit >> 20} MiB", path, "download the file again, or delete it")


def _limit(path: Path) -> int:
    vocabulary = path.name in _VOCABULARIES
    return 256 << 20 if vocabulary else _LIMITS.get(path.suffix, 1 << 62)


def _is_pickle(path: Path) -> bool:
    """Whether a file's content is a pickle, or an archive that holds one, as torch.save writes it."""
    with path.open("rb") as handle:
        if handle.read(2) in _PICKLES and path.suffix != ".safetensors":  # there the bytes may be a length
            return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _hub_link(path: Path) -> bool:
    """Whether a link is the hub cache's own: snapshots/<commit>/<file> to blobs/<sha> of the same repository."""
    named = (parent.parent for parent in path.absolute().parents[1:3] if parent.name == "snapshots")
    return Path(os.path.realpath(path)).parent in {Path(os.path.realpath(repository)) / "blobs" for repository in named}


def _settings_problems(path: Path) -> Iterator[Problem]:
    """Settings in a JSON file that are unsafe or that no model can have."""
    if path.name in _VOCABULARIES:
        return  # the tokenizers library reads them in a separate process (models/trial.py)
    value = _json(path)
    if path.name in {"config.json", "tokenizer_config.json", "generation_config.json"} and not isinstance(value, dict):
        yield _problem("TS202", "must hold a JSON object", path, "download the file again")
        return
    if path.name.endswith(".index.json"):
        return
    for key, each in _settings(value):
        if key in {"auto_map", "trust_remote_code"} and each:
            fix = "use a model whose architecture is built into transformers"
            yield _problem("TS204", f"{key} asks to run code from the model folder", path, fix)
        elif key.endswith("_file") and isinstance(each, str) and _leads_outside(each, path.parent):
            yield _problem("TS205", f"{key} names {each!r}, which is outside the folder", path, "delete the key")
    if path.name == "config.json":
        yield from _config_problems(value, path)
    elif path.name == "generation_config.json":
        yield from _generation_problems(value, path)


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at every nesting level."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield from part.items()
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _leads_outside(name: str, folder: Path) -> bool:
    """Whether `name` would read an existing file outside the folder."""
    return any(
        at.exists() and folder.resolve() not in Path(os.path.realpath(at)).parents and not _hub_link(at)
        for at in (Path(name), folder / name)
    )


def _config_problems(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    again = "give the config.json that save_pretrained wrote with these weights"
    for key, value in _settings(config):
        said = f"{key} = {str(value)[:60]!r}"
        if key == "model_type" and not (isinstance(value, str) and _MODEL_TYPE.fullmatch(value)):
            yield _problem("TS211", f"{said} is not a model type", path, again)
        elif key.endswith("_implementation") and value is not None and value not in _IMPLEMENTATIONS:
            yield _problem("TS204", f"{said} asks for a kernel from elsewhere", path, "delete the key; tunesmith sets it")
        elif key == "quantization_config" and value:
            kind = value.get("quant_method", "?") if isinstance(value, dict) else "?"
            fix = "give the model in 16 bits; `method: qlora` quantises it itself"
            yield _problem("TS212", f"the weights are already quantised ({str(kind)[:40]})", path, fix)
        elif isinstance(value, int) and (abs(value) > _MOST or ("layer" in key and value > _MOST_LAYERS)):
            yield _problem("TS211", f"{said} is too large for any model", path, again)
        elif _SIZE.fullmatch(key) and (isinstance(value, str | float | bool) or (isinstance(value, int) and value < 0)):
            yield _problem("TS211", f"{said} is not a positive whole number", path, again)
    for part in (config, *(each for _, each in _settings(config) if isinstance(each, dict))):
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and (shared == 0 or heads % shared):
            what = f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {shared}"
            yield _problem("TS211", what, path, again)


def _generation_problems(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
            yield _problem("TS211", f"{key} = {str(value)[:60]!r} is not a token id", path, "correct the key, or delete it")


def _weight_problems(path: Path) -> Iterator[Problem]:
    try:
        read_header(path)
    except ValueError as error:
        yield _problem("TS211", str(error), path, "download the file again")


def _index_problems(folder: Path) -> Iterator[Problem]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        value = _json(index)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            yield _problem("TS202", "the shard index has no weight_map", index, "download the model again")
            continue
        for name in sorted({str(value) for value in weight_map.values()}):
            if Path(name).name != name or not (folder / name).is_file():
                what = f"the shard index names {name!r}, which is not a file of this folder"
                yield _problem("TS205", what, index, "use a complete copy of the model whose index names its own shards")
