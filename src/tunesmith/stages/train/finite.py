"""NaN and Inf: caught before the optimizer step, and documented in an incident folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import commit_folder, write_json
from tunesmith.stages.train.summary import first_of

_LAST = 20  # steps before an incident that it records
_ROWS = 3  # rows named in the message; the file names all
_RISEN = 2.0  # times the lowest loss so far; above that the loss counts as having risen


class NotFiniteError(TrainError):
    """A non-finite loss or gradient, at a step whose optimizer update has not been made."""

    def __init__(self, step: int, loss: float, norm: float, *, where: str = "train", known: str = "") -> None:
        self.step, self.loss, self.norm = step, loss, norm
        what = f"loss {loss} and gradient norm {norm} at step {step}{known and f': {known}'}"
        why = "the weights would turn to NaN and every later step would be lost; stopped before the optimizer step"
        fix = "lower train.learning_rate, look at the rows of this step, or set train.compute_dtype: float32"
        super().__init__(Problem("TS301", what, where, why, fix))

    def __reduce__(self) -> tuple[type[TrainError], Any]:
        return TrainError, (self.problems,)


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise NotFiniteError before the optimizer step if the loss or the gradient norm is NaN or Inf."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFiniteError(step, loss, norm)


def check_weights(step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainError if a trained weight that would be saved is NaN or Inf."""
    for name, weight in weights.items():
        if not all_finite(weight):
            why = "the saved weights would be unusable, and would replace usable ones"
            fix = "lower train.learning_rate, or set train.compute_dtype: float32; earlier saves are unchanged"
            raise TrainError(Problem("TS301", f"non-finite weights after step {step}", name, why, fix))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether the tensor has no NaN or Inf; integers have none."""
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
    """Write `incidents/step-000012/incident.json` and return the error that names it.

    `rows` are those of the step: location, tokens, and the loss of the row on its own under the current weights; `steps` are
    lines of metrics.jsonl, of which the last are kept.
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
    """Possible causes, the likeliest first."""
    causes = []
    if weights:
        causes.append(f"{len(weights)} weights are not finite, {weights[0]} first: check the base model")
    if bad and len(bad) < len(rows):
        causes.append(f"{len(bad)} of {len(rows)} rows give a non-finite loss on their own: {first_of(bad, _ROWS)}")
    if losses and losses[-1] > _RISEN * min(losses):
        causes.append(f"the loss had risen from {min(losses):.4g} to {losses[-1]:.4g}: the learning rate is too high")
    if dtype != "float32":
        causes.append(f"matmuls run in {dtype}; float32 is more precise")
    if not bad and not math.isfinite(error.norm):
        causes.append("each row's loss is finite but its gradient is not: overflow in the backward pass")
    return causes or ["every row gives a non-finite loss: overflow in the model"]


def _number(value: float) -> float | str:
    """The value; as text if it is NaN or Inf, which JSON cannot represent."""
    return value if math.isfinite(value) else str(value)
