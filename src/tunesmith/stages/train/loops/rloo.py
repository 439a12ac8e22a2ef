"""RLOO by TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import RLOOConfig, RLOOTrainer

from tunesmith.stages.train.loops.sampling import OwnPrompts, SamplingLoop
from tunesmith.stages.train.loops.trl import Watched


class _Rloo(OwnPrompts, Watched, RLOOTrainer):  # type: ignore[misc] # TRL is untyped here
    pass


class Rloo(SamplingLoop):
    """Answers of a group against each other."""

    config_type: ClassVar[Any] = RLOOConfig
    trainer_type: ClassVar[Any] = _Rloo


LOOP = Rloo
