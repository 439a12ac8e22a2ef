"""Runs that are trained through the stages, and what they left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from tunesmith.recipe import ResolvedRecipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

METHODS = ("full", "lora", "qlora")

QUIET = Console(quiet=True)

MakeRecipe = Callable[..., ResolvedRecipe]


def trained(make_recipe: MakeRecipe, path: Path, **overrides: Any) -> Run:
    run = create_run(make_recipe(**overrides), path)
    prepare(run)
    train(run, QUIET)
    return run


def metrics(run: Run, *names: str) -> list[list[Any]]:
    return [[line[name] for name in names] for line in read_jsonl(run.path / "train" / "metrics.jsonl")]


def weights(run: Run) -> dict[str, torch.Tensor]:
    (path,) = run.path.glob("train/checkpoints/*/*.safetensors")
    return load_file(path)
