"""What `train/summary.json` says of a training, whatever its objective."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tunesmith.stages.train.engine import StepMetrics


def figures_of(history: Sequence[StepMetrics], seconds_before: float) -> dict[str, Any]:
    """Speed and loss over all steps; the first step also allocates, so the median leaves it out.

    `seconds` is the whole training, with what the objective took before the first step.
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


def total_parameters(model: Any) -> int:
    """All parameters of the model; a 4-bit weight counts the parameters that it stands for."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total
