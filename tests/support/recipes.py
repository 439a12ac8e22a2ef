"""Recipes, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.hardware import Hardware
from tunesmith.recipe import Recipe, parse_recipe

GOOD = "model: smollm2-135m-instruct\ndata:\n  train: rows.jsonl\n"


def problems(text: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml", Path("/base"), overrides)
    return {p.what: p.fix for p in caught.value.problems}


CPU = Hardware("cpu", "a cpu", 2, 2**33, 0, None, "float32", "no bfloat16")
GPU = Hardware("cuda", "a card", 8, 2**36, 1, 2**34, "bfloat16", "it multiplies it fastest")


def recipe(**train: Any) -> Recipe:
    lines = [f"train.{key}={value}" for key, value in train.items()]
    return parse_recipe("model: m\ndata:\n  train: x.jsonl\n", "r", Path("/"), lines).recipe
