"""What the C library does with memory that is freed. No torch here: processes that read rows want it too."""

from __future__ import annotations

import ctypes

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
