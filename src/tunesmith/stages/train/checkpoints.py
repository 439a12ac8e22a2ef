"""The checkpoints of a training on the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.io.atomic import commit_folder, remove_folder
from tunesmith.methods import Method
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.finite import check_weights
from tunesmith.stages.train.loops.base import CHECKPOINT


class Checkpoints:
    """The folder of checkpoints, which keeps one: the last that was saved."""

    def __init__(self, folder: Path, method: Method, model: Any, engine: Engine) -> None:
        self.folder, self.method, self.model, self.engine = folder, method, model, engine
        self.latest: Path | None = None

    @property
    def name(self) -> str | None:
        """The folder name of the current checkpoint."""
        return None if self.latest is None else self.latest.name

    def go_on(self, name: str | None) -> None:
        """Resume with the checkpoint of this name, and remove all others."""
        self.latest = None if name is None else self.folder / name
        for path in self.folder.glob("step-*"):
            if path != self.latest:
                remove_folder(path)

    def save(self, step: int) -> None:
        """Commit the current weights, then remove the previous checkpoint. Raises TrainError if a weight is not finite."""
        check_weights(step, {name: parameter for parameter, name in self.engine.trained_parameters().items()})
        before, self.latest = self.latest, self.folder / f"step-{step:06d}"
        if not self.engine.ranks.first:
            return
        with commit_folder(self.latest, CHECKPOINT) as target, self.engine.as_trained():
            self.method.save(self.model, target)
        if before is not None and before != self.latest:
            remove_folder(before)

    def kept(self) -> Path:
        """The current checkpoint."""
        if self.latest is None:
            raise AssertionError("nothing was saved")
        return self.latest
