"""Settings of torch's allocator before it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tunesmith.hardware.allocators import grow_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux alone")
@pytest.mark.parametrize("told", [None, *NAMES])
def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if told is not None:
        monkeypatch.setenv(told, "max_split_size_mb:64")
    grow_segments()
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if told is None else {told: "max_split_size_mb:64"}
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


_LOADING = """
import ctypes
import torch
from tunesmith.hardware.allocators import compact_loading, steady_memory

class Info(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Info
steady_memory()
kept, begun = [], library.mallinfo2().fordblks
with compact_loading():
    for _ in range(64):
        original = torch.zeros(2**19)
        kept.append(original[: 2**16].clone())
        del original
in_gaps = library.mallinfo2().fordblks - begun
large = torch.zeros(2**19)
in_heap = library.mallinfo2().uordblks >= large.nbytes
print(in_gaps < 2**22, in_heap)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_loading_leaves_no_gaps_and_freed_memory_is_kept_afterwards() -> None:
    told = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["True", "True"], told
