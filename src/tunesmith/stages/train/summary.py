"""What `train` writes for every objective: the settings before training, the figures after."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.hardware import Hardware
from tunesmith.io.atomic import write_json
from tunesmith.methods.settings import Settings
from tunesmith.runs import Run
from tunesmith.stages.train.metrics import StepMetrics


def tell_settings(run: Run, settings: Settings, hardware: Hardware, folder: Path) -> None:
    """Write settings.json, and an event for each value that the recipe left open."""
    write_json(folder / "settings.json", {**settings.as_dict(), "hardware": hardware.as_dict()})
    for name, reason in settings.reasons.items():
        if reason != "recipe":
            value = getattr(settings, name)
            run.event(folder, "setting", f"{name} = {value} ({reason})", name=name, value=value, reason=reason)
    if hardware.accelerators > 1:
        run.event(folder, "one-device", f"one of {hardware.accelerators} GPUs is used")


def figures_of(history: Sequence[StepMetrics], seconds_before: float) -> dict[str, Any]:
    """Speed and loss over all steps; the first step also allocates, so the median excludes it.

    `seconds` is the whole training, including the objective's time before the first step.
    """
    seconds = [step.seconds for step in history]
    return {
        "steps": len(seconds),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "tokens_per_second": sum(step.tokens for step in history) / sum(seconds),
        "computed_tokens_per_second": sum(step.computed_tokens for step in history) / sum(seconds),
        "seconds_before_first_step": seconds_before,
        "seconds": seconds_before + sum(seconds),
        "first_loss": history[0].loss,
        "last_loss": history[-1].loss,
    }


def first_of(names: Sequence[str], most: int) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def total_parameters(model: Any) -> int:
    """All parameters of the model; a 4-bit weight counts the parameters it represents."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total
