"""Resolves a name to a checked folder, and loads its tokenizer or model; the only module that calls from_pretrained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, Problem, TunesmithError, first_line
from tunesmith.io import safe
from tunesmith.io.atomic import sha256_file, sha256_json, write_json
from tunesmith.io.cache import cache_folder
from tunesmith.io.hub import hub_errors
from tunesmith.models import builtin
from tunesmith.models.fits import check_names, check_shapes, check_size
from tunesmith.models.rope import scale
from tunesmith.models.trial import try_tokenizer
from tunesmith.recipe import RopeScalingSection

#: The files of a model folder. No other files are fetched from a hub or included in a digest.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a base model: the built-in one, a local folder, or a hub id's snapshot; checked before use.

    Raises ModelError if it does not exist, cannot be fetched, or is not safe to open.
    """
    if name == builtin.NAME:
        folder = builtin.ensure()
    elif Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        folder = Path(name).expanduser()
    else:
        folder = _from_hub(name, revision)
    safe.check_model_folder(folder)
    check_shapes(folder)
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except hub_errors() as error:
        detail = first_line(error)
        why = "neither a local folder nor a hub model of that name could be opened"
        fix = f"check the spelling and the network, or use {builtin.NAME!r} or a local folder"
        raise ModelError(Problem("TS206", f"cannot get {name!r}: {detail}", name, why, fix)) from error


def _digest_entry(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def model_digest(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's files.

    Hashes of files over 1 MB are cached under (path, size, mtime), because re-hashing 140 GB takes minutes.
    """
    ledger_path = cache_folder() / "digests.json"
    try:
        ledger: dict[str, str] = json.loads(ledger_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ledger = {}
    known = len(ledger)
    digests: dict[str, str] = {}
    for path in sorted(p for pattern in PATTERNS for p in folder.glob(pattern)):
        if path.name == "proof.json":
            continue  # describes the model, is not part of it
        if path.stat().st_size < 1_000_000:
            digests[path.name] = sha256_file(path)
        else:
            entry = _digest_entry(path)
            if entry not in ledger:
                ledger[entry] = sha256_file(path)
            digests[path.name] = ledger[entry]
    if len(ledger) != known:
        with contextlib.suppress(OSError):  # an unwritable cache is not an error
            write_json(ledger_path, ledger)
    return sha256_json(digests)


def stop_ids(generation_config: Any) -> list[int]:
    """The stop token ids of a generation config: none, one or several."""
    stops = generation_config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def quiet() -> None:
    """Silence progress bars and warnings that libraries print while loading; errors are still raised."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def make_config(values: Mapping[str, Any], **changes: Any) -> Any:
    """The transformers config object for a config.json's content or a catalogue entry, with some keys changed.

    Raises ValueError for a model type that transformers does not know.
    """
    from transformers import AutoConfig

    facts = {key: value for key, value in values.items() if key not in {"parameters", "model_type", "architectures"}}
    return AutoConfig.for_model(values["model_type"], **{**facts, **changes})


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, unchanged (a missing pad token stays missing). Raises ModelError if it cannot be used."""
    from transformers import AutoTokenizer

    quiet()
    safe.check_model_folder(folder, weights=False)
    try_tokenizer(folder)
    with _refusals("TS216", "the tokenizer cannot be loaded", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def _refusals(code: str, what: str, folder: Path) -> Iterator[None]:
    """Turns any exception of a library on an untrusted folder into a ModelError, except out-of-memory errors."""
    try:
        yield
    except (TunesmithError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        if type(error).__name__ == "OutOfMemoryError":
            raise
        why = "the loaded model would not be the one in the folder"
        fix = "give the folder as save_pretrained wrote it, with tokenizer, config and weights of one model"
        raise ModelError(Problem(code, f"{what}: {first_line(error)}", str(folder), why, fix)) from error


def _safely(dtype: str, quantization_config: Any) -> dict[str, Any]:
    """Arguments for opening any model: no remote code, only safetensors, no downloads; on the GPU if there is one."""
    import torch

    return {
        "dtype": getattr(torch, dtype),
        "device_map": {"": 0} if torch.cuda.is_available() else None,
        "quantization_config": quantization_config,
        "attn_implementation": "sdpa",
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }


def load_model(
    folder: Path, *, dtype: str, quantization_config: Any = None, rope_scaling: RopeScalingSection | None = None
) -> Any:
    """The folder's causal language model in `dtype` ("float32" or "bfloat16"), on the GPU if there is one.

    Uses SDPA attention. Raises ModelError for a folder that is not safe to open, whose weights do not match its config, or
    whose positions cannot be scaled as requested.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    changed = {}
    if rope_scaling is not None:
        safe.check_model_folder(folder)
        with _refusals("TS214", "the model cannot be loaded", folder):
            changed["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        scale(changed["config"], rope_scaling, folder)
    return _opened(AutoModelForCausalLM, folder, **changed, **_safely(dtype, quantization_config))


def load_reward_model(folder: Path, *, dtype: str, quantization_config: Any = None) -> Any:
    """The folder's model with a head that gives one score per sequence; the head is random if the folder has none.

    Raises ModelError for a folder that is not safe to open, or whose weights do not match its config.
    """
    from transformers import AutoModelForSequenceClassification

    return _opened(AutoModelForSequenceClassification, folder, num_labels=1, **_safely(dtype, quantization_config))


def _opened(kind: Any, folder: Path, **how: Any) -> Any:
    """The model in a folder, checked to have exactly the weights of its config."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    quiet()
    safe.check_model_folder(folder)
    with _refusals("TS214", "the model cannot be loaded", folder):
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True).validate(strict=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, num_labels=1)
        with torch.device("meta"):
            check_size(kind.from_config(config, attn_implementation="sdpa"), folder)
        model, info = kind.from_pretrained(folder, **how, output_loading_info=True)
        check_names(model, info, folder)
    return model
