"""What GRPO and RLOO share: TRL samples answers to the prompts that `prepare` made, and calls our rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset

from tunesmith.recipe import SamplingSection
from tunesmith.stages.train.loops.rewards import Reward
from tunesmith.stages.train.loops.trl import TrlLoop, watched

_KEYS = ("num_generations", "num_iterations", "beta", "epsilon", "max_completion_length", "temperature")


class _OwnPrompts:
    """A mixin for trainers that sample: prompts use the ids that `prepare` made."""

    prompts_ids: Mapping[tuple[tuple[str, str], ...], list[int]]

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.prompts_ids[_key(prompt)]) for prompt in prompts], None, {}


def _key(messages: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


class SamplingLoop(TrlLoop):
    """A trainer that samples, with TRL's config and trainer class."""

    config_type: ClassVar[Any]
    trainer_type: ClassVar[Any]

    def trainer(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        asked = self.run.recipe.own(SamplingSection)
        own = {name: getattr(asked, name) for name in _KEYS}
        config = self.config_type(**arguments, **own, reward_weights=self.weights, disable_dropout=True)
        rows, ids = prompt_rows(self.rows)
        functions = [_as_trl(name, reward) for name, reward in zip(asked.reward_funcs, self.rewards, strict=True)]
        made = watched(self.trainer_type, _OwnPrompts)(args=config, train_dataset=rows, reward_funcs=functions, **more)
        made.prompts_ids = ids
        return made


def prompt_rows(rows: Any) -> tuple[Any, dict[tuple[tuple[str, str], ...], list[int]]]:
    """The prompts as messages with their references, and the token ids of each prompt."""
    prompts = [json.loads(text) for text in rows["prompt"]]
    ids = {_key(prompt): list(found) for prompt, found in zip(prompts, rows["prompt_ids"], strict=True)}
    return Dataset.from_dict({"prompt": prompts, "reference": list(rows["reference"])}), ids


def _as_trl(name: str, reward: Reward) -> Callable[..., list[float]]:
    """The reward as TRL calls it."""

    def call(prompts: Any, completions: Any, reference: Sequence[str | None], **_: Any) -> list[float]:
        answers = ["".join(turn["content"] for turn in completion) for completion in completions]
        return list(reward(prompts, answers, reference))

    call.__name__ = name.rpartition("/")[2]
    return call
