"""Going on with an interrupted training: what must be as it was, when savepoints are written, what files are set back to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import write_jsonl
from tunesmith.methods.settings import Settings
from tunesmith.recipe import Recipe, TrainSection
from tunesmith.runs import read_jsonl
from tunesmith.stages.train.engine import Engine, StepMetrics, step_metrics
from tunesmith.stages.train.savepoints import Savepoint, Savepoints
from tunesmith.stages.train.signals import StopSignals

#: Keys that may change between two parts of a training: they decide nothing that is learnt.
FREE = ("train.save_steps",)

_SECONDS = 600.0  # between two savepoints where the recipe leaves it open
_SHARE = 0.02  # of the time that saving may then take
#: Of the settled settings those that decide what is learnt.
_SETTLED = ("effective_batch_size", "max_steps", "learning_rate", "warmup_steps", "compute_dtype", "r", "lora_alpha")


def made_of(recipe: Recipe, sections: tuple[str, ...], inputs: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """All that decides what is learnt, by dotted keys: of the recipe, of the settled settings, and digests of what is read."""
    dumped = recipe.model_dump(mode="json")
    found = {name: value for section in sections for name, value in _dotted(section, dumped[section])}
    found |= {name: digest for name, digest in inputs.items() if name != "recipe"}
    values = settings.as_dict()
    return found | {f"settings.{name}": values[name] for name in _SETTLED}


def _dotted(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _dotted(f"{name}.{key}", inner)
    else:
        yield name, value


def refuse_changed(saved: Savepoint, now: Mapping[str, Any], where: Path) -> None:
    """Raise TrainError naming the keys that have changed since the savepoint, those in `FREE` apart."""
    before = saved.state["made_of"]
    changed = sorted(key for key in before.keys() | now.keys() if key not in FREE and before.get(key) != now.get(key))
    if changed:
        what = f"the training was interrupted after step {saved.step}, and since then has changed: {', '.join(changed)}"
        why = "its second part would be another training than its first"
        fix = "put that back, name another run folder, or begin again with `tunesmith train --restart`"
        raise TrainError(Problem("TS311", what, str(where), why, fix))


def set_back(folder: Path, step: int) -> list[StepMetrics]:
    """Leave in metrics.jsonl the steps up to a savepoint's, and give them."""
    lines = [line for line in read_jsonl(folder / "metrics.jsonl", torn=True) if line["step"] <= step]
    write_jsonl(folder / "metrics.jsonl", lines)
    return [step_metrics(line) for line in lines]


class Saver:
    """Writes a savepoint where it is time to, and after the step in which a signal came; then training stops.

    `more` gives what belongs into it beside the engine's own state.
    """

    def __init__(
        self, asked: TrainSection, savepoints: Savepoints, signals: StopSignals, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.every, self.savepoints, self.signals, self.more = asked.save_steps, savepoints, signals, more
        self.saved_step = 0
        self._last, self._took = time.perf_counter(), 0.0

    def after_step(self, engine: Engine, step: int, steps: int) -> None:
        """Look, once a step's line of metrics is written."""
        if self.signals.asked is not None:
            engine.control.should_training_stop = True
        elif step == steps or not self._is_time(step):
            return
        begun = time.perf_counter()
        engine.save_to(self.savepoints, self.more())
        self.saved_step, self._last = step, time.perf_counter()
        self._took = self._last - begun
        engine.leave_out(self._took)

    def _is_time(self, step: int) -> bool:
        if self.every == "auto":
            return time.perf_counter() - self._last >= max(_SECONDS, self._took / _SHARE)
        return self.every is not None and step % self.every == 0
