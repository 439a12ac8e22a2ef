"""RLOO with TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import RLOOConfig, RLOOTrainer

from tunesmith.stages.train.loops.sampling import SamplingLoop


class Rloo(SamplingLoop):
    """Compares each answer of a group with the mean of the others."""

    config_type: ClassVar[Any] = RLOOConfig
    trainer_type: ClassVar[Any] = RLOOTrainer


LOOP = Rloo
