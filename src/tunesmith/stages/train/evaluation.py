"""The held-out loss during training: keeps the best checkpoint, reports overfitting, and stops early if it persists."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunesmith.engine.packing.batch import to_device
from tunesmith.io.atomic import append_jsonl, write_jsonl
from tunesmith.stages.train.losses import Loss, StepBatches

#: What `EvaluationCallback.as_dict` returns before the first evaluation.
NOTHING_SEEN: Mapping[str, Any] = {"history": [], "best": None, "stopped": False}

_AT_ONCE = 128  # held-out rows that are packed together
_RISES = 2  # consecutive evaluations with a higher held-out and a lower train loss that count as overfitting


def mean_loss(loss: Loss, model: torch.nn.Module, rows: Sequence[Any], batches: StepBatches) -> float:
    """The mean loss over rows, in eval mode and without gradients; `model` is back in training mode afterwards.

    It draws no random numbers, so training continues as if there had been no evaluation.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _AT_ONCE):
            for batch in batches(rows[start : start + _AT_ONCE])["micro_batches"]:
                count += loss.count(batch)
                total += float(loss.read(model(**to_device(batch, device)))[0])
    model.train()
    return total / count


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the held-out rows: losses are means; `train_loss` covers the steps since the previous evaluation."""

    step: int
    eval_loss: float
    train_loss: float
    seconds: float


class EvaluationCallback(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Computes the held-out loss every `every` steps and after the last; writes evals.jsonl and keeps the best checkpoint.

    `evaluate` returns the loss, `save` writes the weights of a step and drops those of the previous best. With `patience`,
    training stops after that many evaluations without a new best. `losses` returns the losses of all steps so far.
    """

    def __init__(
        self,
        *,
        every: int,
        patience: int | None,
        path: Path,
        evaluate: Callable[[], float],
        save: Callable[[int], None],
        losses: Callable[[], Sequence[float]],
        tell: Callable[[str, str], None],
    ) -> None:
        self.every, self.patience, self.path = every, patience, path
        self.evaluate, self.save, self.losses, self.tell = evaluate, save, losses, tell
        self.history: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.stopped = False

    def as_dict(self) -> dict[str, Any]:
        """The state so far, as JSON."""
        best = None if self.best is None else vars(self.best)
        return {"history": [vars(look) for look in self.history], "best": best, "stopped": self.stopped}

    def go_on(self, seen: Mapping[str, Any]) -> None:
        """Restore the state from `as_dict`, and reset evals.jsonl to it."""
        self.history = [Evaluation(**look) for look in seen["history"]]
        self.best = None if seen["best"] is None else Evaluation(**seen["best"])
        self.stopped = seen["stopped"]
        write_jsonl(self.path, seen["history"])

    @property
    def seconds(self) -> float:
        """Time of all evaluations."""
        return sum(look.seconds for look in self.history)

    def on_step_end(self, _arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate if it is due."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step, control)

    def _look(self, step: int, control: Any) -> None:
        begun = time.perf_counter()
        loss = self.evaluate()
        if self.best is None or loss < self.best.eval_loss:
            self.save(step)
        since = self.losses()[self.history[-1].step if self.history else 0 :]
        look = Evaluation(step, loss, statistics.fmean(since), time.perf_counter() - begun)
        self.history.append(look)
        append_jsonl(self.path, vars(look))
        if self.best is None or loss < self.best.eval_loss:
            self.best = look
        self._tell_overfitting()
        waited = sum(each.step > self.best.step for each in self.history)
        if self.patience is not None and waited >= self.patience:
            self.stopped = control.should_training_stop = True
            text = f"stopped at step {step}: the held-out loss has not fallen below {self.best.eval_loss:.4f} of step"
            self.tell("stopped-early", f"{text} {self.best.step} for {waited} evaluations")

    def _tell_overfitting(self) -> None:
        """An event when the train loss keeps falling while the held-out loss rises; once per rise."""
        last = self.history[-_RISES - 1 :]
        pairs = pairwise(last)
        rises = [after.eval_loss > before.eval_loss and after.train_loss < before.train_loss for before, after in pairs]
        if len(rises) == _RISES and all(rises) and not self._rose_before():
            text = f"held-out loss {last[0].eval_loss:.4f} -> {last[-1].eval_loss:.4f}, train loss"
            self.tell("overfitting", f"{text} {last[0].train_loss:.4f} -> {last[-1].train_loss:.4f} by step {last[-1].step}")

    def _rose_before(self) -> bool:
        """Whether the rise had begun before the last `_RISES` evaluations, and so was reported."""
        earlier = self.history[-_RISES - 2 : -_RISES]
        return (
            len(earlier) == 2 and earlier[1].eval_loss > earlier[0].eval_loss and earlier[1].train_loss < earlier[0].train_loss
        )
