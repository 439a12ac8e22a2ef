"""The training loops: the engine, TRL's trainers, and PPO. An objective refers to its loop by module name.

Each module has a `LOOP`, which is a subclass of `base.Loop`.
"""

from __future__ import annotations

import importlib.util

from tunesmith.errors import Problem, TrainError
from tunesmith.recipe import Objective
from tunesmith.stages.train.loops.base import CHECKPOINT, Loop, Work

__all__ = ["CHECKPOINT", "Loop", "Work", "loop_of"]


def loop_of(objective: Objective) -> type[Loop]:
    """The loop of an objective. Raises TrainError if a package that it needs is not installed."""
    if objective.extra is not None and importlib.util.find_spec(objective.extra) is None:
        what = f"objective: {objective.name} needs {objective.extra.upper()}, which is not installed"
        fix = f"pip install 'tunesmith[{objective.extra}]'"
        raise TrainError(Problem("TS302", what, "objective", "its loop and loss come from that package", fix))
    loop: type[Loop] = importlib.import_module(f"{__name__}.{objective.loop}").LOOP
    return loop
