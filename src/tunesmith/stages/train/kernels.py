"""What is compiled for a run: custom kernels, and blocks if the run asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.engine.modeling.blocks import fuse_blocks, fusible
from tunesmith.kernels import cpu, triton
from tunesmith.kernels.dispatch import compiled
from tunesmith.kernels.liger import liger
from tunesmith.methods.settings import Settings
from tunesmith.models.head import causal_of


def compile_blocks(settings: Settings, model: Any, tell: Callable[..., None]) -> None:
    """Fuse the block's small operators with torch.compile or Liger if the recipe asks for it; an event if that fails.

    Also writes an event if custom kernels cannot be compiled: those for CPUs, which make training faster, and those for GPUs
    if they are asked for.
    """
    causal = causal_of(model)
    if model.device.type == "cpu":
        ours, reason = "tunesmith's faster ones", cpu.unsupported_reason()
    else:
        ours, reason = "tunesmith's", triton.unsupported_reason(model.device) if triton.asked() else None
    if reason is not None:
        tell("kernels-off", f"PyTorch's kernels instead of {ours}: {reason}", reason=reason)
    try:
        fuse_asked(settings, causal)
    except RuntimeError as error:
        code, what = ("liger-off", "no Liger") if settings.use_liger_kernel else ("compile-off", "blocks are not compiled")
        tell(code, f"{what}: {error}", reason=str(error))


def fuse_asked(settings: Settings, causal: Any) -> None:
    """Put compiled or Liger operators into the blocks of a causal language model, if the settings ask for them.

    Raises RuntimeError if that is not possible.
    """
    if not (settings.torch_compile or settings.use_liger_kernel):
        return
    if not fusible(causal.config):
        raise RuntimeError(f"blocks of architecture {causal.config.model_type!r} cannot be fused; they run as in transformers")
    fuse_blocks(causal, (liger if settings.use_liger_kernel else compiled)(causal.device))
