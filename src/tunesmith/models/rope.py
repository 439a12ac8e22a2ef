"""RoPE scaling: more positions than a model was trained for, through transformers' own `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, Problem
from tunesmith.models.families import FAMILIES, runs_on_trees
from tunesmith.recipe import RopeScalingSection


def check_scalable(values: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError if scaling the positions of a model with this config.json is not well defined."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not runs_on_trees(values.get("model_type")):
        what = f"rope_scaling for the architecture {values.get('model_type')!r}"
    elif any(isinstance(value, Mapping) for value in rope.values()):
        what = "rope_scaling, but the model's layers use different rotary embeddings"
    elif kind != "default":
        what = f"rope_scaling, but the model's positions are already scaled ({kind})"
    elif not values.get("max_position_embeddings"):
        what = "rope_scaling, but config.json has no max_position_embeddings"
    else:
        return
    scalable = [name for name, family in FAMILIES.items() if family.causal_rotary]
    why = "the exported model would not match any published scaling method"
    fix = f"remove rope_scaling, or use an unscaled model of one of these types: {', '.join(scalable)}"
    raise ModelError(Problem("TS210", what, str(folder / "config.json"), why, fix))


def window(values: Mapping[str, Any], asked: RopeScalingSection | None) -> int | None:
    """Positions of a model with this config.json after the requested scaling; None if the config names none."""
    known = values.get("max_position_embeddings")
    return None if not known else round(known * (1.0 if asked is None else asked.factor))


def scale(config: Any, asked: RopeScalingSection, folder: Path) -> None:
    """Apply the scaling to a transformers config in place. Raises ModelError as `check_scalable` does.

    Linear interpolation (Chen et al. 2023, arXiv 2306.15595) or YaRN (Peng et al. 2023, arXiv 2309.00071).
    """
    values = config.to_dict()
    check_scalable(values, folder)
    changes: dict[str, Any] = {"rope_type": asked.rope_type, "factor": asked.factor}
    if asked.rope_type == "yarn":
        changes["original_max_position_embeddings"] = values["max_position_embeddings"]
    config.rope_parameters = {**config.rope_parameters, **changes}
    config.max_position_embeddings = window(values, asked)
