"""GRPO with TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer

from tunesmith.stages.train.loops.sampling import SamplingLoop


class Grpo(SamplingLoop):
    """Compares the answers of a group with each other."""

    config_type: ClassVar[Any] = GRPOConfig
    trainer_type: ClassVar[Any] = GRPOTrainer


LOOP = Grpo
