"""`--trace`: the planned step on FakeTensors of the real modules, compared with the closed form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tunesmith.errors import PlanError, Problem
from tunesmith.hardware.catalogue import GIB
from tunesmith.models.catalogue import find_config
from tunesmith.models.load import make_config, quiet
from tunesmith.planner.options import Option
from tunesmith.planner.result import Plan
from tunesmith.planner.tracing.trace import Peak, trace

_SHOWN = 6

#: With more blocks than this, a few are traced and extrapolated if the result agrees with the closed form.
LARGE = 48
_DEPTHS = (8, 9, 10)
_AGREE = 0.01


def trace_option(plan: Plan, option: Option) -> Iterator[str]:
    """Lines with the traced peak, where it occurs, what is alive there, and the FLOPs by operator."""
    begun = time.perf_counter()
    peak = trace_peak(plan, option)
    took = time.perf_counter() - begun
    formula = option.memory.total_bytes
    yield ""
    yield f"trace of {option.method}, {option.scenario.tokens:,} tokens per micro-batch, in {took:.1f} s"
    yield (
        f"  peak {peak.total_bytes / GIB:.3f} GiB allocated, in {peak.phase} at {peak.operator}; "
        f"closed form {formula / GIB:.3f} ({100 * (formula / peak.total_bytes - 1):+.2f} %)"
    )
    for held in peak.largest(_SHOWN):
        yield f"  {held.size / GIB:8.3f} GiB  {held.phase:9} {held.operator}"
    total = sum(peak.flops.values())
    yield f"  {total / 1e12:.1f} TFLOP per step: " + ", ".join(
        f"{name} {100 * count / total:.0f} %" for name, count in sorted(peak.flops.items(), key=lambda item: -item[1])[:4]
    )
    if option.method == "full" and plan.device.count > 1:
        yield from _sharded_lines(plan, option)


def _sharded_lines(plan: Plan, option: Option) -> Iterator[str]:
    """The same model sharded over all devices with FSDP2: transformers' own forward and loss, fused AdamW in bf16."""
    from tunesmith.planner.tracing.sharded import trace_sharded

    scenario, count = replace(option.scenario, attention="sdpa"), plan.device.count
    for name, reshard in (("full shard", True), ("without resharding", False)):
        peak = trace_sharded(_config(plan), scenario, count, reshard=reshard)
        yield f"  FSDP2 over {count}, {name}, stock forward and fused AdamW: {peak.total_bytes / GIB:.3f} GiB per device"


def trace_peak(plan: Plan, option: Option) -> Peak:
    """The trace of an option's step. Raises PlanError if transformers does not know the architecture."""
    layers = plan.architecture.num_hidden_layers
    if layers > LARGE:
        few = [trace(_config(plan, num_hidden_layers=depth, layer_types=None), option.scenario) for depth in _DEPTHS]
        peak = multiplied(few, layers)
        if peak is not None and abs(peak.total_bytes / option.memory.total_bytes - 1) < _AGREE:
            return peak
    return trace(_config(plan), option.scenario)


def multiplied(few: Sequence[Peak], layers: int) -> Peak | None:
    """The peak of `layers` blocks, extrapolated from `_DEPTHS`; None if each further block did not add the same.

    Bytes grow linearly as long as the peak stays at the same operator. Whether it stays there is not known, so the caller
    compares the result with the closed form.
    """
    second, third = few[-2:]
    steps = {(b.total_bytes - a.total_bytes, b.resident_bytes - a.resident_bytes) for a, b in pairwise(few)}
    if len(steps) != 1 or len({(peak.phase, peak.operator) for peak in few}) != 1:
        return None
    more = layers - _DEPTHS[-1]
    flops = {name: count + more * (count - second.flops[name]) for name, count in third.flops.items()}
    total, resident = (
        getattr(third, name) + more * (getattr(third, name) - getattr(second, name))
        for name in ("total_bytes", "resident_bytes")
    )
    return replace(third, total_bytes=total, resident_bytes=resident, flops=flops)


def _config(plan: Plan, **changes: Any) -> Any:
    """The model's transformers config, with some keys changed."""
    quiet()
    values, source = find_config(plan.model)
    try:
        return make_config(values, **changes)
    except ValueError as error:
        why = "the trace runs transformers' own modules"
        fix = "omit --trace: the closed form covers it"
        raise PlanError(Problem("TS209", f"transformers has no {values['model_type']!r}", source, why, fix)) from error
