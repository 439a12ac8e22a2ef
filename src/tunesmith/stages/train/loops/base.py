"""The loop interface: the part of training that depends on the objective, between resolved settings and saved weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.hardware import Hardware
from tunesmith.methods import Method
from tunesmith.methods.settings import Settings, settle
from tunesmith.runs import Run
from tunesmith.stages.train.ranks import Ranks
from tunesmith.stages.train.recorder import Recorder
from tunesmith.stages.train.resume import Earlier

#: The kind that a folder of trained weights is committed as.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Work:
    """What a loop needs besides its rows: the model as its method built it, the resolved settings, where it may write.

    `folder` becomes the run's `train/`; `tell` writes an event (code, message, facts) into it. `scratch` is temporary.
    """

    method: Method
    model: Any
    settings: Settings
    folder: Path
    scratch: Path
    console: Console
    tell: Callable[..., None]
    ranks: Ranks
    earlier: Earlier


class Loop(ABC):
    """Trains one run. It is created before a model is loaded, so that errors in its rows or rewards show at once."""

    work: Work

    def __init__(self, run: Run, rows: Any, tokenizer: Any) -> None:
        """Raises RecipeError, DataError or TrainError for anything that cannot be trained."""
        self.run, self.rows, self.tokenizer = run, rows, tokenizer

    def settle(self, hardware: Hardware) -> Settings:
        """The run's settings on this machine."""
        return settle(self.run.recipe, len(self.rows), hardware)

    def build(self, method: Method) -> Any:
        """The model to train, as its method builds it."""
        return method.build()

    def before(self, work: Work) -> float:
        """Store what the loop works with and do the one-time work; returns the seconds of it that count as training."""
        self.work = work
        return 0.0

    @abstractmethod
    def train(self, recorder: Recorder) -> None:
        """Run all steps and record each. Raises TrainError when loss or gradients become non-finite."""

    @abstractmethod
    def save(self) -> Path:
        """The checkpoint to keep, under `work.folder`; written if it does not exist yet."""

    def facts(self) -> dict[str, Any]:
        """The loop's own entries in summary.json."""
        return {}
