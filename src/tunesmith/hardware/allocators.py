"""What the C library, torch's allocator and oneDNN do with memory that is no longer used.

No torch here: processes that read rows want it too.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is asked for next, instead of giving it back; False where it cannot.

    A training step on a CPU frees and asks for gigabytes; each page that comes back from the kernel is zeroed and mapped
    again: 3 to 5 % of a step (glibc only: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD).
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, _LARGEST) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
    except (OSError, AttributeError):
        return False


def give_back_freed_memory() -> bool:
    """Let the C library give back all that is freed after all; False where it cannot (glibc only: malloc_trim(3))."""
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0) == 1)
    except (OSError, AttributeError):
        return False


def keep_few_products() -> None:
    """Let oneDNN and what torch keeps of it hold 64 compiled products each instead of 1,024, unless the user has said how many.

    A product is compiled for each number of rows: 1 to 3 ms and 0.5 MB, so a training whose steps differ in length would grow
    by gigabytes. A step uses about 25 for each length that its micro-batches have. Read once, before the first product.
    """
    for name in ("DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's documentation; ideep's lru_cache.hpp
        os.environ.setdefault(name, "64")


def steady_memory() -> None:
    """Tell the libraries what training on a CPU wants: freed memory stays, compiled products do not pile up."""
    keep_freed_memory()
    keep_few_products()


def grow_segments() -> None:
    """Let torch's allocator for GPUs grow its segments instead of making new ones, unless the user has told it what to do.

    Freed memory then fits what is asked for next: a peak about 2 % above the bytes asked for instead of 6 (PyTorch's notes on
    CUDA memory management, `expandable_segments`). It is read once, before the first allocation.
    """
    told = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if sys.platform == "linux" and not told:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
