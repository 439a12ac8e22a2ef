"""GRPO by TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer

from tunesmith.stages.train.loops.sampling import SamplingLoop


class Grpo(SamplingLoop):
    """Answers of a group against each other."""

    config_type: ClassVar[Any] = GRPOConfig
    trainer_type: ClassVar[Any] = GRPOTrainer


LOOP = Grpo
