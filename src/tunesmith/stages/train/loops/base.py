"""What a loop is: the part of a training that differs by objective, between the settled settings and the saved weights."""

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

#: What a folder of trained weights is committed as.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Work:
    """All that a loop needs beside its rows: the model as its method built it, the settled settings, where it may write.

    `folder` becomes the run's `train/`; `tell` writes an event (code, message, facts) into it. `scratch` is thrown away.
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
    """Trains one run. It is made before a model is loaded, so that what is wrong with its rows or rewards shows at once."""

    work: Work

    def __init__(self, run: Run, rows: Any, tokenizer: Any) -> None:
        """Raises RecipeError, DataError or TrainError for what cannot be trained."""
        self.run, self.rows, self.tokenizer = run, rows, tokenizer

    def settle(self, hardware: Hardware) -> Settings:
        """The settings of the run on this machine."""
        return settle(self.run.recipe, len(self.rows), hardware)

    def build(self, method: Method) -> Any:
        """The model that is trained, as its method builds it."""
        return method.build()

    def before(self, work: Work) -> float:
        """Take up what the loop works with and do what is done once; the seconds of it that count as training."""
        self.work = work
        return 0.0

    @abstractmethod
    def train(self, recorder: Recorder) -> None:
        """All steps, each recorded. Raises TrainError when loss or gradients stop being finite."""

    @abstractmethod
    def save(self) -> Path:
        """The checkpoint below `work.folder` that is kept, written where it is not there yet."""

    def facts(self) -> dict[str, Any]:
        """What summary.json says beside what it says of every training."""
        return {}
