"""GRPO by TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer

from tunesmith.stages.train.loops.sampling import OwnPrompts, SamplingLoop
from tunesmith.stages.train.loops.trl import Watched


class _Grpo(OwnPrompts, Watched, GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
    pass


class Grpo(SamplingLoop):
    """Answers of a group against each other."""

    config_type: ClassVar[Any] = GRPOConfig
    trainer_type: ClassVar[Any] = _Grpo


LOOP = Grpo
