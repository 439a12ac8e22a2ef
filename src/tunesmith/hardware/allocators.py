"""Settings for how the C library, torch's allocator and oneDNN handle memory that is no longer used.

No torch here: processes that read rows use this module too.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for later allocations instead of returning it; False if it cannot.

    A training step on a CPU frees and allocates gigabytes. The kernel zeroes and maps each returned page again, which takes
    3 to 5 % of a step (glibc only: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD).
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, _LARGEST) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
    except (OSError, AttributeError):
        return False


def give_back_freed_memory() -> bool:
    """Make the C library return all freed memory to the kernel; False if it cannot (glibc only: malloc_trim(3))."""
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0) == 1)
    except (OSError, AttributeError):
        return False


def keep_few_products() -> None:
    """Limit the caches of compiled GEMMs in oneDNN and torch to 64 each instead of 1,024, unless the user has set a size.

    A GEMM is compiled for each number of rows, at 1 to 3 ms and 0.5 MB. Training with varying lengths would grow by gigabytes.
    A step uses about 25 for each length of its micro-batches. The limits are read once, before the first GEMM.
    """
    for name in ("DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's documentation; ideep's lru_cache.hpp
        os.environ.setdefault(name, "64")


def steady_memory() -> None:
    """Configure the libraries for training on a CPU: freed memory is kept, compiled GEMMs do not accumulate."""
    keep_freed_memory()
    keep_few_products()


def grow_segments() -> None:
    """Let torch's CUDA allocator grow its segments instead of adding new ones, unless the user has configured it.

    Freed memory then fits later allocations: the peak is about 2 % above the requested bytes instead of 6 % (PyTorch's notes
    on CUDA memory management, `expandable_segments`). The setting is read once, before the first allocation.
    """
    told = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if sys.platform == "linux" and not told:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
