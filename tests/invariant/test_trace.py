"""The traced peak is the peak of the same step on real tensors, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.invariant.test_packing import CONFIGS
from tunesmith.stages.plan.trace import Scenario, StorageMeter, measure, trace

FULL = Scenario(rows=3, length=48, labelled=20, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "lora bf16", "qlora"])
def test_trace_equals_real_allocation(name: str, checkpointing: bool, method: str) -> None:
    facts: dict[str, Any] = {"gradient_checkpointing": checkpointing, "r": None if method == "full" else 4}
    if method == "lora bf16":
        facts |= {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    if method == "qlora":
        facts |= {"dtype": torch.bfloat16, "nf4": True}
    scenario = Scenario(**{**FULL.__dict__, **facts})
    traced, real = trace(CONFIGS[name], scenario), measure(CONFIGS[name], scenario)
    assert traced.total_bytes == real.total_bytes
    assert traced.resident_bytes == real.resident_bytes
    assert traced.phase == real.phase


def test_more_tokens_take_more_and_checkpointing_less() -> None:
    config = CONFIGS["llama"]
    base = trace(config, FULL).total_bytes
    assert trace(config, Scenario(**{**FULL.__dict__, "length": 96})).total_bytes > base
    assert trace(config, Scenario(**{**FULL.__dict__, "gradient_checkpointing": True})).total_bytes < base


def test_meter_counts_each_storage_once_and_until_it_is_freed() -> None:
    meter = StorageMeter()
    with meter:
        made = torch.zeros(256)  # 1,024 bytes
        _view = made.view(16, 16)[2:]
        made.add_(1)
        other = made + 1
        assert meter.live == 2048
        del other
        assert meter.live == 1024
    assert meter.peak.total_bytes == 2048
