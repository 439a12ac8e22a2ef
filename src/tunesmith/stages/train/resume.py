"""Resuming an interrupted training: what must not change, when savepoints are written, what files are reset to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.errors import Problem, StoppedError, TrainError
from tunesmith.io.atomic import append_jsonl, write_jsonl
from tunesmith.methods.settings import Settings
from tunesmith.recipe import Recipe
from tunesmith.runs import Run, read_jsonl
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.metrics import StepMetrics, step_metrics
from tunesmith.stages.train.ranks import Ranks
from tunesmith.stages.train.savepoints import Savepoint, Savepoints
from tunesmith.stages.train.signals import StopSignals

#: Keys that may change before a resume: they do not affect what is learned.
FREE = ("train.save_steps",)

_SECONDS = 600.0  # between two savepoints if the recipe leaves it open
_SHARE = 0.02  # share of the time that saving may then take
#: The resolved settings that affect what is learned.
_SETTLED = ("effective_batch_size", "max_steps", "learning_rate", "warmup_steps", "compute_dtype", "r", "lora_alpha")


def made_of(recipe: Recipe, inputs: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """Everything that affects what is learned, by dotted keys: recipe, resolved settings, and digests of the inputs."""
    dumped = recipe.model_dump(mode="json")
    found = {name: value for section in recipe.stage_sections("train") for name, value in _dotted(section, dumped[section])}
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
    """Raise TrainError naming the keys that have changed since the savepoint, except those in `FREE`."""
    before = saved.state["made_of"]
    changed = sorted(key for key in before.keys() | now.keys() if key not in FREE and before.get(key) != now.get(key))
    if changed:
        what = f"the training was interrupted after step {saved.step}; changed since then: {', '.join(changed)}"
        why = "the resumed part would be a different training from the first"
        fix = "restore them, name another run folder, or start over with `tunesmith train --restart`"
        raise TrainError(Problem("TS311", what, str(where), why, fix))


class Earlier:
    """What an earlier part of the training left in its folder; `saved` is the savepoint to resume from, if any."""

    def __init__(self, run: Run, folder: Path, console: Console) -> None:
        """`folder` is where this process writes, which is the run's folder only in the first process."""
        self._run, self._folder, self._console = run, folder, console
        self._events = read_jsonl(folder / "events.jsonl", torn=True)
        (folder / "events.jsonl").unlink(missing_ok=True)
        every = run.recipe.train.save_steps
        self.savepoints = Savepoints(
            run.path / "train" / "savepoints",
            lambda code, text: run.event(folder, code, text),
            every if isinstance(every, int) else 1,
        )
        self.saved: Savepoint | None = None
        self.made: Mapping[str, Any] = {}

    def look(self, made: Mapping[str, Any]) -> None:
        """Find the newest intact savepoint. Raises TrainError if anything in `made_of` has changed since."""
        self.made, self.saved = made, self.savepoints.newest()
        if self.saved is not None:
            refuse_changed(self.saved, made, self._run.path)

    def begin(self) -> list[StepMetrics]:
        """Reset metrics.jsonl to the savepoint's step, keep the earlier events; returns the finished steps."""
        step = 0 if self.saved is None else self.saved.step
        written = read_jsonl(self._run.path / "train" / "metrics.jsonl", torn=True)
        lines = [line for line in written if line["step"] <= step]
        write_jsonl(self._folder / "metrics.jsonl", lines)
        if self.saved is not None:
            recorded = self._run.events("train")
            for event in self._events:
                if event not in recorded and event.get("step", 0) <= step:  # later ones will occur again
                    append_jsonl(self._folder / "events.jsonl", event)
            self._run.event(self._folder, "resumed", f"resumed after step {step}", step=step)
            self._console.print(f"train: resuming after step {step}")
        return [step_metrics(line) for line in lines]

    def of(self, key: str) -> Any:
        """The savepoint's state under a key; None if there is no savepoint."""
        return None if self.saved is None else self.saved.state[key]


class Saver:
    """Writes a savepoint when one is due, and after the step in which a signal came; then training stops.

    `more` returns what it holds besides the engine's own state.
    """

    def __init__(
        self, settings: Settings, earlier: Earlier, signals: StopSignals, ranks: Ranks, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.every, self.earlier, self.signals, self.ranks, self.more = settings.save_steps, earlier, signals, ranks, more
        self.stopped_training = False
        self._last, self._took = time.perf_counter(), 0.0

    def after_step(self, engine: Engine, step: int, steps: int) -> None:
        """Save if it is due, once a step's line of metrics is written."""
        if step == steps or engine.control.should_training_stop:
            return  # the last step: the trained weights are saved anyway
        signalled = [number for number in self.ranks.gathered(self.signals.asked) if number is not None]
        if signalled:
            self.signals.asked = signalled[0]
            self.stopped_training = engine.control.should_training_stop = True
        elif not self.ranks.agreed(self._is_time(step)):
            return
        begun = time.perf_counter()
        engine.save_to(self.earlier.savepoints, {"made_of": self.earlier.made, **self.more()})
        self._last = time.perf_counter()
        self._took = self._last - begun
        engine.recorder.exclude_from_timing(self._took)

    def stopped(self, step: int, console: Console) -> StoppedError:
        """The error for a training that a signal stopped after this step."""
        if self.signals.asked is None:
            raise AssertionError("no signal came")
        name = self.signals.asked.name
        console.print(f"train: stopped by {name} after step {step}, which is saved; run it again to resume")
        return StoppedError(128 + self.signals.asked)

    def _is_time(self, step: int) -> bool:
        if self.every == "auto":
            return time.perf_counter() - self._last >= max(_SECONDS, self._took / _SHARE)
        return self.every is not None and step % self.every == 0
