"""The plan: memory, time and cost of each method, the recommended one, and the rules behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import Problem
from tunesmith.hardware.catalogue import GIB, Device
from tunesmith.models.architecture import Architecture
from tunesmith.planner.datafacts import DataFacts
from tunesmith.planner.decide import EXPECTED_QUALITY, Cluster, Reason, rule_of_thumb
from tunesmith.planner.options import Option
from tunesmith.recipe import Method


@dataclass(frozen=True)
class Plan:
    """Inputs and outcome of a plan. `recommended` is None if nothing fits; `change` says what would change the answer."""

    model: str
    source: str
    architecture: Architecture
    device: Device
    facts: DataFacts
    options: Mapping[Method, Option]
    recommended: Method | None
    reasons: Sequence[Reason]
    change: Sequence[str]
    clusters: Mapping[Method, Cluster]
    elsewhere: Mapping[Method, tuple[Device, Option]]

    def as_dict(self) -> dict[str, Any]:
        """The content of plan.json; its keys are stable."""
        a, device = self.architecture, self.device
        methods = [
            option.as_dict()
            | {
                "expected_quality": EXPECTED_QUALITY[option.method],
                "distributed": self.clusters[option.method].as_dict() if option.method in self.clusters else None,
            }
            for option in self.options.values()
        ]
        return {
            "format": 1,
            "model": {
                "name": self.model,
                "source": self.source,
                "model_type": a.model_type,
                "parameters": a.parameters,
                "hidden_size": a.hidden_size,
                "active_parameters": a.active_parameters,
                "fp16_weight_bytes": 2 * a.parameters,
            },
            "hardware": {
                "name": device.name,
                "kind": device.kind,
                "count": device.count,
                "memory_bytes": device.memory_bytes,
                "compute_dtype": device.compute_dtype,
                "price_an_hour": device.price,
                "note": device.note,
            },
            "data": self.facts.as_dict(),
            "methods": methods,
            "rule_of_thumb": rule_of_thumb(a, device),
            "recommended": self.recommended,
            "reasons": [reason.as_dict() for reason in self.reasons],
            "what_would_change_it": list(self.change),
            "elsewhere": [_elsewhere_dict(*each) for each in self.elsewhere.values()],
        }

    def problem(self) -> Problem:
        """Why there is no recommendation, and the nearest alternative that would fit."""
        least = min(self.options.values(), key=lambda option: option.safe_memory_bytes)
        need, have = least.safe_memory_bytes / GIB, self.device.memory_bytes / GIB
        fitting = [option.method for option in self.options.values() if option.fits]
        if fitting:
            what = f"{' and '.join(fitting)} would fit, but not within the limits"
        else:
            one = "one card's " if self.device.count > 1 else ""
            what = f"nothing fits: the smallest, {least.method}, needs {need:.1f} GiB of {one}{have:.1f}"
        fix = "; ".join(self.change) or "use a smaller model"
        return Problem("TS704", what, f"{self.model} on {self.device.name}", "training would run out of memory or money", fix)


def _elsewhere_dict(device: Device, option: Option) -> dict[str, Any]:
    return {
        "method": option.method,
        "device": device.name,
        "memory_bytes": device.memory_bytes,
        "price_an_hour": device.price,
        "safe_memory_bytes": option.safe_memory_bytes,
        "hours": option.hours,
        "cost": option.cost,
    }
