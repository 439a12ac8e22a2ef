"""Settings of torch's allocator before it starts."""

from __future__ import annotations

import os
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
