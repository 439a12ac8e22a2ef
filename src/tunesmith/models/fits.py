"""Checks that a folder's weights match its config.json: by shape before loading, by name after loading.

transformers initialises missing weights randomly and ignores weights that the config does not name. Both would silently train
a model that nobody published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, Problem
from tunesmith.io.atomic import read_json
from tunesmith.io.safe import stored_tensors
from tunesmith.models.families import family_of, read_architecture


def check_shapes(folder: Path) -> None:
    """Raise ModelError if a model of a covered architecture lacks weights, or if its weights contradict its config.json.

    Does not need torch. Other architectures are checked by `check_size` and `check_names`.
    """
    config = read_json(folder / "config.json")
    kind = (config.get("text_config") or config).get("model_type", config.get("model_type"))
    family = family_of(kind)
    if family is None or not family.in_transformers:
        return
    architecture = read_architecture(config, str(folder / "config.json"))
    tensors = stored_tensors(folder)
    layers, alone = architecture.num_hidden_layers, "text_config" not in config
    for each in architecture.linears:
        shape = (each.out_features, each.in_features)
        named = [stored for name, stored in tensors.items() if name.endswith(f".{each.name}.weight")]
        right = sum(stored.shape == shape for stored in named)
        if right < layers or (alone and len(named) > layers):  # another part of the model may have layers with the same name
            what = f"{right} of its {len(named)} weights {each.name} are {_times(shape)}; the config says {layers}"
            raise _other(folder, what)
    embedding = (architecture.vocab_size, architecture.hidden_size)
    if not any(each.shape == embedding for each in tensors.values()):
        raise _other(folder, f"no embedding of {_times(embedding)} (vocab_size x hidden_size in the config)")


def check_size(skeleton: Any, folder: Path) -> None:
    """Raise ModelError if `skeleton`, a model on the meta device, has more parameters than the folder holds.

    Call it before allocating the model's memory. A head that is new to a base model (`score`) may be missing.
    """
    named = sum(each.numel() for name, each in skeleton.named_parameters() if not name.startswith("score."))
    held = sum(each.elements for each in stored_tensors(folder).values())
    if named > held:
        raise _other(folder, f"the files hold {held:,} values, but a model with that config has {named:,} parameters")


def check_names(model: Any, info: Mapping[str, Iterable[Any]], folder: Path) -> None:
    """Raise ModelError if transformers' loading info for a model lists weights that were missing or ignored.

    Ignored weights without a counterpart in the model are accepted (old buffers, the parts of another modality). The weights
    of a surplus layer have one, and are not.
    """
    missing = sorted(str(name) for name in info["missing_keys"] if not str(name).startswith("score."))
    if missing:
        raise _other(folder, f"{len(missing)} weights are missing, such as {missing[0]}")
    known = {_like(name) for name, _ in model.named_parameters()}
    over = sorted(str(name) for name in info["unexpected_keys"] if _like(str(name)) in known)
    if over:
        raise _other(folder, f"{len(over)} weights belong to no layer of the model, such as {over[0]}")


def _like(name: str) -> str:
    """A weight's name with its numbers replaced by `*`: the same for that weight in all layers."""
    return re.sub(r"\d+", "*", name)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _other(folder: Path, what: str) -> ModelError:
    why = "missing weights would be random, and surplus weights would be ignored"
    fix = "download config.json and weights of the same model"
    return ModelError(Problem("TS215", f"the weights do not match config.json: {what}", str(folder), why, fix))
