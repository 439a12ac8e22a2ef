"""What is compiled for a run: kernels of ours for CPUs, and blocks where the run asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith import native
from tunesmith.methods.blocks import fuse_blocks, fusible
from tunesmith.methods.elementwise import compiled
from tunesmith.packing.loss import causal_of
from tunesmith.runs import Run


def compile_blocks(run: Run, model: Any, folder: Path) -> None:
    """Have torch.compile make the block's small operators where `train.torch_compile` is set; an event where it cannot be.

    On a CPU an event also where kernels of ours cannot be compiled, and training takes longer for it.
    """
    causal = causal_of(model)
    reason = native.reason_against() if model.device.type == "cpu" else None
    if reason is not None:
        run.event(
            folder, "kernels-off", f"PyTorch's kernels in place of tunesmith's, which are faster: {reason}", reason=reason
        )
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
