"""Blocks compiled for a run that asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.methods.blocks import fuse_blocks, fusible
from tunesmith.methods.elementwise import compiled
from tunesmith.packing.loss import causal_of
from tunesmith.runs import Run


def compile_blocks(run: Run, model: Any, folder: Path) -> None:
    """Have torch.compile make the block's small operators where `train.torch_compile` is set; an event where it cannot be."""
    causal = causal_of(model)
    if not run.recipe.train.torch_compile:
        return
    try:
        fuse_compiled(causal)
    except RuntimeError as error:
        run.event(folder, "compile-off", f"blocks are not compiled: {error}", reason=str(error))


def fuse_compiled(causal: Any) -> None:
    """Compiled operators in the blocks of a causal language model. Raises RuntimeError where that cannot be."""
    if not fusible(causal.config):
        raise RuntimeError(f"blocks of the architecture {causal.config.model_type!r} run as transformers has them")
    fuse_blocks(causal, compiled(causal.device))
