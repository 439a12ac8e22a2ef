"""What is compiled for a run: custom kernels, and blocks where the run asks for it."""

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
    """Have torch.compile, or Liger, make the block's small operators where the recipe asks for it; an event where it cannot be.

    An event also where custom kernels cannot be compiled, and training takes longer for it.
    """
    causal = causal_of(model)
    reason = cpu.unsupported_reason() if model.device.type == "cpu" else triton.unsupported_reason(model.device)
    if reason is not None:
        tell("kernels-off", f"PyTorch's kernels in place of tunesmith's, which are faster: {reason}", reason=reason)
    try:
        fuse_asked(settings, causal)
    except RuntimeError as error:
        code, what = ("liger-off", "no Liger") if settings.use_liger_kernel else ("compile-off", "blocks are not compiled")
        tell(code, f"{what}: {error}", reason=str(error))


def fuse_asked(settings: Settings, causal: Any) -> None:
    """Compiled operators, or Liger's, in the blocks of a causal language model, where the settings ask for them.

    Raises RuntimeError where that cannot be.
    """
    if not (settings.torch_compile or settings.use_liger_kernel):
        return
    if not fusible(causal.config):
        raise RuntimeError(f"blocks of the architecture {causal.config.model_type!r} run as transformers has them")
    fuse_blocks(causal, (liger if settings.use_liger_kernel else compiled)(causal.device))
