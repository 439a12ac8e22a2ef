"""Which models' positions can be scaled, and the resulting context window; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.rope import check_scalable, window
from tunesmith.recipe import RopeScalingSection, parse_recipe

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
LINEAR = RopeScalingSection(rope_type="linear", factor=8)


@pytest.mark.parametrize("more", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}])
def test_an_unscaled_model_is_scalable(more: dict[str, Any]) -> None:
    check_scalable(LLAMA | more, Path("m"))


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "gpt2"},
        {"max_position_embeddings": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    ],
)
def test_others_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="TS210"):
        check_scalable(LLAMA | more, Path("m"))


def test_the_window_grows_by_the_factor() -> None:
    assert (window(LLAMA, None), window(LLAMA, LINEAR), window({}, LINEAR)) == (4096, 32768, None)


@pytest.mark.parametrize("scaling", ["{rope_type: dynamic, factor: 2}", "{rope_type: yarn, factor: 1}", "{rope_type: linear}"])
def test_bad_scaling_is_refused(scaling: str) -> None:
    with pytest.raises(RecipeError, match="rope_scaling"):
        parse_recipe(f"model: m\ndata: {{train: t.jsonl}}\nrope_scaling: {scaling}\n", "r", Path("/"))
