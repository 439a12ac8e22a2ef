"""Peak memory of a section of work, beyond what the process held before it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import psutil
import torch

from tunesmith.hardware.allocators import give_back_freed_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resettable() -> bool:
    """Whether the kernel lets this process reset its high-water mark (Linux, proc(5): clear_refs)."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return _STATUS.exists()


class PeakMemory:
    """The process's peak memory since `reset`, minus what was resident when the meter was created.

    CUDA: bytes reserved by torch's allocator, so without the CUDA context. CPU: the kernel's high-water mark of resident
    memory (Linux), which includes weights, gradients, optimizer states, activations and the allocator's slack. On other
    platforms the mark cannot be reset, so it also covers loading. Create it before loading the model, in a fresh process.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.resettable = not self.cuda and sys.platform == "linux" and _resettable()
        give_back_freed_memory()  # otherwise memory freed earlier would hide later allocations
        self.baseline = 0 if self.cuda else int(psutil.Process().memory_info().rss)

    def reset(self) -> None:
        """Discard earlier peaks, such as that of loading the model, and return freed memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        give_back_freed_memory()
        if self.resettable:
            _resettable()

    def peak_bytes(self) -> int:
        """Bytes at the highest point since `reset` (or since the process began, if it cannot be reset)."""
        if self.cuda:
            return int(torch.cuda.max_memory_reserved())
        if self.resettable:
            return max(0, _status_bytes("VmHWM") - self.baseline)
        info = psutil.Process().memory_info()
        peak = getattr(info, "peak_wset", None)
        if peak is None:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(0, int(peak) - self.baseline)
