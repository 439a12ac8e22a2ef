"""Settings for how the C library, torch's allocator and oneDNN handle memory that is no longer used.

No torch here: processes that read rows use this module too.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1
_APART = 2**17  # glibc's own initial threshold, which it raises to the size of any larger block that is freed


def _thresholds(trim: int, mmap: int) -> bool:
    """Set malloc's two thresholds, in bytes (glibc only: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD)."""
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(*each) == 1 for each in ((_TRIM_THRESHOLD, trim), (_MMAP_THRESHOLD, mmap)))
    except (OSError, AttributeError):
        return False


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for later allocations instead of returning it; False if it cannot.

    A training step on a CPU frees and allocates gigabytes. The kernel zeroes and maps each returned page again, which takes
    3 to 5 % of a step.
    """
    return _thresholds(_LARGEST, _LARGEST)


@contextmanager
def compact_loading() -> Iterator[None]:
    """While a model loads, map each tensor apart and unmap it when it is freed; afterwards freed memory is kept as above.

    Loading frees much between tensors that stay, such as the originals of quantised weights. In a heap that keeps freed
    memory, these gaps fill with later, smaller tensors, and a long training's resident memory grows to the peak of the loading.
    """
    _thresholds(_APART, _APART)
    try:
        yield
    finally:
        keep_freed_memory()


def give_back_freed_memory() -> bool:
    """Make the C library return all freed memory to the kernel; False if it cannot (glibc only: malloc_trim(3))."""
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0) == 1)
    except (OSError, AttributeError):
        return False


def keep_few_gemms() -> None:
    """Limit the caches of compiled GEMMs in oneDNN and torch to 64 each instead of 1,024, unless the user has set a size.

    A GEMM is compiled for each number of rows, at 1 to 3 ms and 0.5 MB. Training with varying lengths would grow by gigabytes.
    A step uses about 25 for each length of its micro-batches. The limits are read once, before the first GEMM.
    """
    for name in ("DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's documentation; ideep's lru_cache.hpp
        os.environ.setdefault(name, "64")


def steady_memory() -> None:
    """Configure the libraries for training on a CPU: freed memory is kept, compiled GEMMs do not accumulate."""
    keep_freed_memory()
    keep_few_gemms()


def grow_segments() -> None:
    """Let torch's CUDA allocator grow its segments instead of adding new ones, unless the user has configured it.

    Freed memory then fits later allocations: the peak is about 2 % above the requested bytes instead of 6 % (PyTorch's notes
    on CUDA memory management, `expandable_segments`). The setting is read once, before the first allocation.
    """
    configured = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if sys.platform == "linux" and not configured:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
