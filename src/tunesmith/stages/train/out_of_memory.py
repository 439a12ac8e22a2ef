"""Out of memory: told from other errors, answered by smaller micro-batches, or by the name of what would need less."""

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

#: In the errors of CUDA, of torch on a CPU and of the standard library.
_TEXTS = ("allocate memory", "not enough memory", "out of memory", "bad_alloc")

#: In those of oneDNN, which give no reason: it may also be a product that the processor cannot have.
_NO_REASON = ("could not create a", "could not execute a")

_ROOM = 1 << 30  # bytes: where so much can be had, an error without a reason has another one


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or in the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(text in str(error) for text in _NO_REASON):
        return _is_short()
    return any(text in str(error) for text in _TEXTS)


def _is_short() -> bool:
    """Whether the machine has little memory left, or does not give it to this process."""
    if psutil.virtual_memory().available < _ROOM:
        return True
    try:
        torch.empty(_ROOM, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_smaller_parts(batches: StepBatches, rows: Rows, made: int, tokens: int) -> list[Batch] | None:
    """The rows in more micro-batches than `made`, whose largest had so many tokens; None where each row stands alone already.

    `batches` keeps the smaller limit for all steps to come.
    """
    while made < len(rows) and tokens > 1:
        tokens //= 2
        batches.limits = Limits(tokens, batches.limits.rows)  # the largest that fit: memory has been weighed
        found = batches(rows)["micro_batches"]
        if len(found) > made:
            return found
    return None


def next_lever(settings: Settings, model: Any, longest: int) -> str | None:
    """What to change next and what it does in bytes, the cheapest first; None where all is used.

    `longest` is in tokens, or 0 where no row has been computed yet.
    """
    parameters = list(model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    count, weights = sum(each.numel() for each in trained), sum(each.numel() * each.element_size() for each in parameters)
    if longest and settings.gradient_checkpointing is not True:
        kept = model.config.num_hidden_layers * longest * model.config.hidden_size * trained[0].element_size()
        return f"train.gradient_checkpointing: true (keeps {kept:,} bytes of the row, and computes the rest again)"
    rounded = sum(each.numel() for each in trained if each.dtype == torch.bfloat16)
    states = int(count * state_bytes(settings.optim) + rounded * master_bytes(settings.optim))
    if settings.method == "full" and settings.optim != "adamw_8bit":
        fewer = int(count * state_bytes("adamw_8bit"))
        return f"train.optim: adamw_8bit (optimizer states of {fewer:,} bytes instead of {states:,})"
    if settings.method == "full" and trained[0].device.type != "cpu" and not settings.optimizer_offloading:
        return f"train.optimizer_offloading: true (optimizer states of {states:,} bytes go to the machine's memory)"
    if settings.method == "full":
        return f"method: lora ({states + weights:,} bytes of optimizer states and gradients less)"
    if settings.method == "lora":
        fewer = int(NF4_BYTES * sum(each.numel() for each in parameters))
        return f"method: qlora (weights of about {fewer:,} bytes instead of {weights:,})"
    return None


def out_of_memory(settings: Settings | None, model: Any | None, longest: int, error: str) -> TrainError:
    """The error of a training that does not fit: with one row of `longest` tokens, or where that is 0 before any."""
    lever = None if settings is None or model is None else next_lever(settings, model, longest)
    fix = f"set {lever}" if lever else "take a smaller model, method: qlora, or a smaller data.max_length"
    if longest and settings is not None and settings.optimizer_in_backward and settings.per_device_train_batch_size != 1:
        what = "out of memory, and a step whose weights move in the backward pass cannot be cut"
        fix = "lower train.per_device_train_batch_size"
    else:
        what = f"out of memory with one row of {longest:,} tokens" if longest else "out of memory before the first row"
    why = f"no smaller part can be computed ({' '.join(error.split())[:200]})"
    return TrainError(Problem("TS312", what, "train", why, f"{fix}; `tunesmith plan` says what fits"))
