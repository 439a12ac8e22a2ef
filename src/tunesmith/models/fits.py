"""Whether a folder's weights are those of its config.json: by shapes before anything is loaded, by names once it is.

transformers fills what is missing with random numbers and leaves out what the config does not name; both would train a model
that nobody published, without a word.
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
    """Raise ModelError where a model of a covered architecture lacks weights, or has others than its config.json says.

    Torch is not needed. Other architectures are left to `check_size` and `check_names`.
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
        if right < layers or (alone and len(named) > layers):  # another part of it may have layers of the same name
            what = f"{right} of its {len(named)} weights {each.name} are {_times(shape)}, where the config says {layers}"
            raise _other(folder, what)
    embedding = (architecture.vocab_size, architecture.hidden_size)
    if not any(each.shape == embedding for each in tensors.values()):
        raise _other(folder, f"no embedding of {_times(embedding)}, as it says (vocab_size x hidden_size)")


def check_size(skeleton: Any, folder: Path) -> None:
    """Raise ModelError where `skeleton`, a model on the meta device, has more parameters than the folder holds.

    To be asked before its memory is. A head that is new to a base model (`score`) may be missing.
    """
    named = sum(each.numel() for name, each in skeleton.named_parameters() if not name.startswith("score."))
    held = sum(each.elements for each in stored_tensors(folder).values())
    if named > held:
        raise _other(folder, f"the files hold {held:,} numbers, and a model of that config has {named:,} parameters")


def check_names(model: Any, info: Mapping[str, Iterable[Any]], folder: Path) -> None:
    """Raise ModelError where transformers' account of a loaded model names weights that were missing, or left out.

    Left out by intent is what has no like in the model (old buffers, the parts of another modality); a layer has.
    """
    missing = sorted(str(name) for name in info["missing_keys"] if not str(name).startswith("score."))
    if missing:
        raise _other(folder, f"{len(missing)} weights are missing, such as {missing[0]}")
    known = {_like(name) for name, _ in model.named_parameters()}
    over = sorted(str(name) for name in info["unexpected_keys"] if _like(str(name)) in known)
    if over:
        raise _other(folder, f"{len(over)} weights are of no layer that it has, such as {over[0]}")


def _like(name: str) -> str:
    """A weight's name with no number in it: that of the same weight in all layers."""
    return re.sub(r"\d+", "*", name)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _other(folder: Path, what: str) -> ModelError:
    why = "random numbers would stand for what is missing, and what is too much would be left out"
    fix = "fetch config.json and weights of one model"
    return ModelError(Problem("TS215", f"the weights are not those of config.json: {what}", str(folder), why, fix))
