"""Out of memory: detects it, retries with smaller micro-batches, or names a setting that needs less memory."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch

from tunesmith.engine.optim.sizes import NF4_BYTES, master_bytes, state_bytes
from tunesmith.engine.packing.batch import Batch, Rows
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import Problem, TrainError
from tunesmith.hardware.allocators import give_back_freed_memory
from tunesmith.methods.settings import Settings
from tunesmith.stages.train.losses import StepBatches

#: Parts of the errors of CUDA, of torch on a CPU and of the standard library.
_TEXTS = ("allocate memory", "not enough memory", "out of memory", "bad_alloc")

#: Parts of oneDNN's errors, which give no reason: it may also be a matmul that the processor does not support.
_NO_REASON = ("could not create a", "could not execute a")

_ROOM = 1 << 30  # bytes: if this much can be allocated, an error without a reason has another cause


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out, on a GPU or in the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(text in str(error) for text in _NO_REASON):
        return _is_short()
    return any(text in str(error) for text in _TEXTS)


def _is_short() -> bool:
    """Whether the machine has little memory left, or this process cannot allocate it."""
    if psutil.virtual_memory().available < _ROOM:
        return True
    try:
        torch.empty(_ROOM, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def release() -> None:
    """Return unreferenced memory."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_smaller_parts(batches: StepBatches, rows: Rows, made: int, tokens: int) -> list[Batch] | None:
    """The rows in more than `made` micro-batches, of which the largest had `tokens` tokens; None if each row is already alone.

    `batches` keeps the smaller limit for all later steps.
    """
    while made < len(rows) and tokens > 1:
        tokens //= 2
        batches.limits = Limits(tokens, batches.limits.rows)  # without `start`: the largest within the limit
        found = batches(rows)["micro_batches"]
        if len(found) > made:
            return found
    return None


def next_lever(settings: Settings, model: Any, longest: int) -> str | None:
    """The setting to change next and its effect in bytes, the cheapest first; None if all are in use.

    `longest` is in tokens, or 0 if no row has been computed yet.
    """
    parameters = list(model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    count, weights = sum(each.numel() for each in trained), sum(each.numel() * each.element_size() for each in parameters)
    if longest and settings.gradient_checkpointing is not True:
        kept = model.config.num_hidden_layers * longest * model.config.hidden_size * trained[0].element_size()
        return f"train.gradient_checkpointing: true (keeps {kept:,} bytes of the row, and recomputes the rest)"
    rounded = sum(each.numel() for each in trained if each.dtype == torch.bfloat16)
    states = int(count * state_bytes(settings.optim) + rounded * master_bytes(settings.optim))
    if settings.method == "full" and settings.optim != "adamw_8bit":
        fewer = int(count * state_bytes("adamw_8bit"))
        return f"train.optim: adamw_8bit (optimizer states of {fewer:,} bytes instead of {states:,})"
    if settings.method == "full" and trained[0].device.type != "cpu" and not settings.optimizer_offloading:
        return f"train.optimizer_offloading: true (moves optimizer states of {states:,} bytes to host memory)"
    if settings.method == "full":
        return f"method: lora (saves {states + weights:,} bytes of optimizer states and gradients)"
    if settings.method == "lora":
        fewer = int(NF4_BYTES * sum(each.numel() for each in parameters))
        return f"method: qlora (weights of about {fewer:,} bytes instead of {weights:,})"
    return None


def out_of_memory(settings: Settings | None, model: Any | None, longest: int, error: str) -> TrainError:
    """The error for a training that does not fit: with one row of `longest` tokens, or if that is 0, before any row."""
    lever = None if settings is None or model is None else next_lever(settings, model, longest)
    fix = f"set {lever}" if lever else "use a smaller model, method: qlora, or a smaller data.max_length"
    if longest and settings is not None and settings.optimizer_in_backward and settings.per_device_train_batch_size != 1:
        what = "out of memory, and a step that updates weights in the backward pass cannot be split"
        fix = "lower train.per_device_train_batch_size"
    else:
        what = f"out of memory with one row of {longest:,} tokens" if longest else "out of memory before the first row"
    why = f"the work cannot be split further ({' '.join(error.split())[:200]})"
    return TrainError(Problem("TS312", what, "train", why, f"{fix}; `tunesmith plan` shows what fits"))
