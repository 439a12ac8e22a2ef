"""The measurements of an optimizer step, as stored in a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    `tokens` counts the tokens of all rows, `computed_tokens` those that went through the model: fewer if rows share
    prefixes, more if they are padded. `seconds` is wall time since the previous step. `figures` are the objective's own.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int
    labelled_tokens: int
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A line of metrics.jsonl, with the figures merged into the other keys."""
        values = asdict(self)
        figures: dict[str, float] = values.pop("figures")
        return values | figures


def step_metrics(line: Mapping[str, Any]) -> StepMetrics:
    """The step of a line of metrics.jsonl."""
    own = {each.name for each in fields(StepMetrics)} - {"figures"}
    figures = {key: value for key, value in line.items() if key not in own}
    return StepMetrics(**{key: value for key, value in line.items() if key in own}, figures=figures)
