"""Finds a model's config.json without its weights: in a local folder, the catalogue of known models, or the hub. No torch."""

from __future__ import annotations

import difflib
import json
import re
import socket
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import ModelError, Problem, first_line
from tunesmith.io import safe
from tunesmith.io.hub import hub_errors
from tunesmith.models import builtin

_CATALOGUE_NAME_OF_BUILTIN = "HuggingFaceTB/SmolLM2-135M"


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Shapes of well-known models by hub id, with the keys of transformers' config.json."""
    text = files("tunesmith.models").joinpath("data/models.toml").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = tomllib.loads(text)["models"]
    return models


def _key(name: str) -> str:
    """A model's name without publisher, tuning suffix and date."""
    short = name.lower().rpartition("/")[2].replace("_", "-").replace("meta-llama-", "llama-")
    return re.sub(r"-(instruct|chat|it|base|hf)(?=-|$)|-\d{4}$", "", re.sub(r"-\d{4}$", "", short))


def find_config(name: str, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """(config.json's content, its source) for a model: a folder, the built-in model, the catalogue, else the hub.

    Raises ModelError with the nearest catalogue names if none of these has it.
    """
    path = Path(name).expanduser()
    if name == builtin.NAME:
        return known_models()[_CATALOGUE_NAME_OF_BUILTIN], "built in"
    if path.is_dir() or path.suffix == ".json" or name.startswith((".", "/", "~")):
        return _from_folder(path), str(path / "config.json" if path.is_dir() else path)
    by_key = {_key(known): known for known in known_models()}
    known = by_key.get(_key(name))
    if known is not None:
        return known_models()[known], f"catalogue: {known}"
    if name.count("/") == 1:
        return _from_hub(name, revision, _nearest(name, by_key)), f"hub: {name}"
    why = "memory and time are computed from the model's shape"
    raise ModelError(Problem("TS206", f"unknown model {name[:80]!r}", "model", why, _nearest(name, by_key)))


def _nearest(name: str, by_key: dict[str, str]) -> str:
    near = difflib.get_close_matches(_key(name), list(by_key), 3, 0.5)
    hint = f"nearest known: {', '.join(by_key[key] for key in near)}; or " if near else ""
    return f"{hint}give a folder with a config.json, or a hub id"


def _from_folder(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        why = "memory and time are computed from the model's shape"
        raise ModelError(Problem("TS201", "there is no config.json", str(path), why, "check the path"))
    if path.is_dir():
        safe.check_model_folder(path, weights=False)
    return _parse(file.read_text(encoding="utf-8", errors="replace"), str(file))


def _reachable(address: str) -> bool:
    """Whether a connection can be opened, within three seconds."""
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = f"not valid JSON: {error}"
        raise ModelError(Problem("TS208", detail, source, "it describes the model's shape", "download it again")) from error
    if not isinstance(values, dict):
        raise ModelError(Problem("TS208", "not a JSON object", source, "it describes the model's shape", "download it again"))
    return values


def _from_hub(name: str, revision: str | None, fix: str) -> dict[str, Any]:
    from huggingface_hub import constants, hf_hub_download

    try:
        offline = not _reachable(constants.ENDPOINT)  # otherwise the library retries for half a minute
        path = hf_hub_download(name, "config.json", revision=revision, local_files_only=offline)
    except hub_errors() as error:
        detail = first_line(error)[:200]
        why = "it is not in the catalogue, and its config.json could not be fetched"
        raise ModelError(Problem("TS206", f"cannot get {name!r}: {detail}", name, why, fix)) from error
    return _parse(Path(path).read_text(encoding="utf-8"), name)
