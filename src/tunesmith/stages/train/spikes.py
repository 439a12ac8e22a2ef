"""Loss spikes: a loss far above the previous steps' is reported with the step's rows, and rolled back if the recipe says so."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import Problem, TrainError
from tunesmith.methods.settings import Settings
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.evaluation import mean_loss
from tunesmith.stages.train.metrics import StepMetrics
from tunesmith.stages.train.resume import Earlier
from tunesmith.stages.train.summary import first_of

WINDOW = 32  # previous steps that a loss is compared with
_LEAST = 12  # of them needed before anything counts as a spike
_DEVIATIONS = 6.0  # times the window's median absolute deviation, scaled to a normal distribution
_TIMES = 1.5  # times the window's median
_ROWS = 5  # named in the message, those with the highest loss first; the event has all
_IN_A_ROW = 3  # rollbacks allowed without `WINDOW` quiet steps between


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether a loss stands out from the previous ones: relative to their spread, and more than half above their median."""
    window = before[-WINDOW:]
    if len(window) < _LEAST:
        return False
    middle = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(each - middle) for each in window)
    return loss > middle + _DEVIATIONS * spread and loss > _TIMES * middle


class SpikeDetector:
    """Checks each step's loss, once its line of metrics is written."""

    def __init__(self, settings: Settings, earlier: Earlier, tell: Any) -> None:
        """`tell` writes an event: code, message and facts."""
        self.settings, self.earlier, self.tell = settings, earlier, tell
        self.undone: list[int] = []  # steps at which training rolled back

    def as_dict(self) -> dict[str, Any]:
        """Its state in a savepoint."""
        return {"undone": self.undone}

    def go_on(self, seen: Mapping[str, Any] | None) -> None:
        """Restore the state from `as_dict`."""
        self.undone = list(seen["undone"]) if seen else []

    def after_step(self, engine: Engine, step: StepMetrics) -> None:
        """Raises TrainError if three rollbacks in a row have not helped."""
        before = [each.loss for each in engine.recorder.history[:-1]]
        if not is_spike(step.loss, before):
            return
        middle = statistics.median(before[-WINDOW:])
        rows = self._rows(engine)
        named = first_of(rows, _ROWS)
        text = f"loss {step.loss:.4g} at step {step.step}, {middle:.4g} before; its rows, the worst first: {named}"
        self.tell("loss-spike", text, step=step.step, loss=step.loss, median=middle, rows=rows)
        if self.settings.on_spike == "rollback":
            self._roll_back(engine, step.step)

    def _rows(self, engine: Engine) -> list[str]:
        """The locations of the step's rows, ordered by the loss of each row on its own."""
        own = {str(row["where"]): mean_loss(engine.loss, engine.model, [row], engine.batches) for row in engine.step_rows}
        losses = {where: loss for each in engine.ranks.gathered(own) for where, loss in each.items()}
        return sorted(losses, key=lambda where: -losses[where])

    def _roll_back(self, engine: Engine, step: int) -> None:
        every = self.settings.save_steps
        saved = self.earlier.savepoints.newest(every=every if isinstance(every, int) else 1)
        if saved is None:
            self.tell("not-rolled-back", f"no savepoint was made before step {step}: train.save_steps is {every}", step=step)
            return
        self.undone = [*(each for each in self.undone if each > step - WINDOW), step]
        if len(self.undone) > _IN_A_ROW:
            what = f"the loss has spiked at step {step} after rollbacks at steps {', '.join(map(str, self.undone[:-1]))}"
            fix = "lower train.learning_rate, or look at the rows that events.jsonl names"
            raise TrainError(Problem("TS313", what, "train", "skipping rows does not help here", fix))
        engine.roll_back(saved)
        text = f"weights and optimizer are back at step {saved.step}: updates of steps {saved.step + 1} to {step} are undone"
        self.tell("rolled-back", text, step=step, to=saved.step)
