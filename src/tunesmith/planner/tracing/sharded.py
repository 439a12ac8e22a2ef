"""The trace of a sharded step: FSDP2 over any number of devices on FakeTensors, with a process group that sends nothing.

It traces transformers' own forward and loss under `fully_shard`, on rank 0. Full shard (ZeRO-3) gathers a block's weights
before it computes and frees them afterwards; without resharding (ZeRO-2) they stay until the block's backward pass is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.building import build_model
from tunesmith.planner.tracing.trace import Peak, StorageMeter, as_fake, fake_batch, make_batch, trace_step


@contextlib.contextmanager
def _pretended_group(devices: int) -> Iterator[Any]:
    """A mesh of `devices` devices; this process is rank 0, and no other exists."""
    if dist.is_initialized():
        raise RuntimeError("a process group is already initialized")
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (devices,))
    finally:
        dist.destroy_process_group()


class _Aside:
    """Entered by DTensor while it infers a result's shape on full-size tensors, which no device holds."""

    def __enter__(self) -> None:
        StorageMeter.paused = True

    def __exit__(self, *_: object) -> None:
        StorageMeter.paused = False


@contextlib.contextmanager
def _shapes_aside() -> Iterator[None]:
    """Exclude DTensor's shape inference from the count; the hook is the lock that torch takes around it."""
    propagator: Any = ShardingPropagator
    before = propagator._fake_mode_lock
    propagator._fake_mode_lock = _Aside()
    try:
        yield
    finally:
        propagator._fake_mode_lock = before


def trace_sharded(config: Any, scenario: Scenario, devices: int, *, reshard: bool = True) -> Peak:
    """The peak on one of `devices` that share a full fine-tuning step, each with the scenario's rows.

    Raises ValueError for adapters: mixing frozen and trained parameters in a block is not covered.
    """
    if scenario.method != "full":
        raise ValueError("the sharded trace covers only full fine-tuning")
    scenario = replace(scenario, stock=True, optim="adamw_torch_fused")
    model = build_model(config, scenario, "meta")
    mode = FakeTensorMode()
    as_fake(model, mode)
    with _pretended_group(devices) as mesh, _shapes_aside(), mode:
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        return trace_step(model, fake_batch(make_batch(config, scenario)), scenario)
