"""`--trace`: the planned step on fake tensors of the real modules, beside what the closed form says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tunesmith.errors import PlanError, Problem
from tunesmith.hardware.catalogue import GIB
from tunesmith.models.catalogue import find_config
from tunesmith.models.load import make_config, quiet
from tunesmith.stages.plan.options import Option
from tunesmith.stages.plan.stage import Plan
from tunesmith.stages.plan.trace import Peak, trace

_SHOWN = 6


def trace_option(plan: Plan, option: Option) -> Iterator[str]:
    """Lines that tell the traced peak, where it is, what is alive there, and the FLOPs by operator."""
    begun = time.perf_counter()
    peak = trace_peak(plan, option)
    took = time.perf_counter() - begun
    formula = option.memory.total_bytes
    yield ""
    yield f"trace of {option.method}, {option.scenario.tokens:,} tokens at once, in {took:.1f} s"
    yield (
        f"  peak {peak.total_bytes / GIB:.3f} GiB allocated, in {peak.phase} at {peak.operator}; "
        f"closed form {formula / GIB:.3f} ({100 * (formula / peak.total_bytes - 1):+.2f} %)"
    )
    for held in peak.largest(_SHOWN):
        yield f"  {held.size / GIB:8.3f} GiB  {held.phase:9} {held.operator}"
    total = sum(peak.flops.values())
    yield f"  {total / 1e12:.1f} TFLOP a step: " + ", ".join(
        f"{name} {100 * count / total:.0f} %" for name, count in sorted(peak.flops.items(), key=lambda item: -item[1])[:4]
    )
    if option.method == "full" and plan.device.count > 1:
        yield from _sharded_lines(plan, option)


def _sharded_lines(plan: Plan, option: Option) -> Iterator[str]:
    """The same model shared by all devices with FSDP2, by transformers' own forward and loss, fused AdamW in bf16."""
    from tunesmith.stages.plan.sharded import trace_sharded

    scenario, count = replace(option.scenario, attention="sdpa"), plan.device.count
    for name, reshard in (("full shard", True), ("without resharding", False)):
        peak = trace_sharded(_config(plan), scenario, count, reshard=reshard)
        yield f"  FSDP2 over {count}, {name}, stock forward and fused AdamW: {peak.total_bytes / GIB:.3f} GiB on each"


def trace_peak(plan: Plan, option: Option) -> Peak:
    """The trace of an option's step. Raises PlanError for an architecture that transformers does not know."""
    return trace(_config(plan), option.scenario)


def _config(plan: Plan) -> Any:
    """The model's configuration as transformers has it."""
    quiet()
    values, source = find_config(plan.model)
    try:
        return make_config(values)
    except ValueError as error:
        why = "the trace runs transformers' own modules"
        fix = "leave --trace out: the closed form covers it"
        raise PlanError(Problem("TS209", f"transformers has no {values['model_type']!r}", source, why, fix)) from error
