"""Reward models with TRL's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import RewardConfig, RewardTrainer

from tunesmith.methods import Method
from tunesmith.methods.reward_model import build_reward_model
from tunesmith.recipe import RewardSection
from tunesmith.stages.train.loops.trl import TrlLoop, watched

_NAMES = {"input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}


class Reward(TrlLoop):
    """Pairs of answers, each scored with one number."""

    def build(self, method: Method) -> Any:
        return build_reward_model(method, self.tokenizer.pad_token_id)

    def trainer(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        asked = self.run.recipe.own(RewardSection)
        config = RewardConfig(**arguments, center_rewards_coefficient=asked.center_rewards_coefficient, max_length=None)
        rows = self.rows.select_columns(list(_NAMES)).rename_columns(_NAMES)
        return watched(RewardTrainer)(args=config, train_dataset=rows, **more)


LOOP = Reward
