"""Numbers that are none: found before the optimizer moves, and what is known of them kept in an incident folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import commit_folder, write_json
from tunesmith.stages.train.summary import first_of

_LAST = 20  # steps told of before an incident
_ROWS = 3  # rows named in the message; the file names all
_RISEN = 2.0  # times the least loss so far, from where the loss is said to have risen


class NotFiniteError(TrainError):
    """A loss or a gradient that is no number, at a step whose update has not been made."""

    def __init__(self, step: int, loss: float, norm: float, *, where: str = "train", known: str = "") -> None:
        self.step, self.loss, self.norm = step, loss, norm
        what = f"loss {loss} and gradient norm {norm} at step {step}{known and f': {known}'}"
        why = "the weights would turn to NaN and every later step would be lost; the optimizer has not moved"
        fix = "lower train.learning_rate, look at the rows of this step, or set train.compute_dtype: float32"
        super().__init__(Problem("TS301", what, where, why, fix))

    def __reduce__(self) -> tuple[type[TrainError], Any]:
        return TrainError, (self.problems,)


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise NotFiniteError before the optimizer moves where the loss or the gradient norm is no number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFiniteError(step, loss, norm)


def check_weights(step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainError where a trained weight that would be saved is no number."""
    for name, weight in weights.items():
        if not all_finite(weight):
            why = "what would be saved could not be used, and would take the place of what can"
            fix = "lower train.learning_rate, or set train.compute_dtype: float32; what was saved before is as it was"
            raise TrainError(Problem("TS301", f"weights that are not finite after step {step}", name, why, fix))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether each number of it is one; integers are."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def incident(
    folder: Path,
    error: NotFiniteError,
    *,
    parameters: Mapping[str, torch.Tensor],
    rows: Sequence[tuple[str, int, float]],
    steps: Sequence[Mapping[str, Any]],
    dtype: str,
) -> NotFiniteError:
    """Write `incidents/step-000012/incident.json` and give the error that names it.

    `rows` are those of the step: where each stands, its tokens, and the loss that it gives on its own under the weights as they
    are; `steps` are lines of metrics.jsonl, of which the last are kept.
    """
    weights = sorted(name for name, parameter in parameters.items() if not all_finite(parameter))
    bad = [where for where, _, loss in rows if not math.isfinite(loss)]
    causes = _causes(error, weights, bad, rows, [float(step["loss"]) for step in steps], dtype)
    path = folder / "incidents" / f"step-{error.step:06d}"
    with commit_folder(path, "incident") as target:
        value = {
            "step": error.step,
            "loss": _number(error.loss),
            "grad_norm": _number(error.norm),
            "causes": causes,
            "rows": [{"where": where, "tokens": tokens, "loss": _number(loss)} for where, tokens, loss in rows],
            "weights_not_finite": weights,
            "last_steps": list(steps[-_LAST:]),
        }
        write_json(target / "incident.json", value)
    return NotFiniteError(error.step, error.loss, error.norm, where=str(path), known="; ".join(causes))


def _causes(
    error: NotFiniteError, weights: list[str], bad: list[str], rows: Sequence[Any], losses: list[float], dtype: str
) -> list[str]:
    """What may have led to it, the likeliest first."""
    causes = []
    if weights:
        causes.append(f"{len(weights)} weights hold numbers that are not finite, {weights[0]} first: look at the base model")
    if bad and len(bad) < len(rows):
        causes.append(f"{len(bad)} of {len(rows)} rows alone give no finite loss: {first_of(bad, _ROWS)}")
    if losses and losses[-1] > _RISEN * min(losses):
        causes.append(f"the loss had risen from {min(losses):.4g} to {losses[-1]:.4g}: the learning rate is too high for it")
    if dtype != "float32":
        causes.append(f"products are computed in {dtype}, which float32 would do more exactly")
    if not bad and not math.isfinite(error.norm):
        causes.append("each row's loss is finite, its gradient is not: numbers overflow in the backward pass")
    return causes or ["every row gives a loss that is not finite: the numbers overflow in the model"]


def _number(value: float) -> float | str:
    """JSON has no name for what is not finite."""
    return value if math.isfinite(value) else str(value)
