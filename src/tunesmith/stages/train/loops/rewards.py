"""Rewards for sampled answers: named ones, functions from the user's own file, and reward models. Text in, numbers out.

A reward is called with a batch: the prompts as messages, the answers as text, the rows' references (None if a row has none).
It returns one finite number per answer.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tunesmith.chat.fields import equal_fields, parse_json
from tunesmith.chat.formats import Message
from tunesmith.chat.template import ChatTemplate
from tunesmith.errors import Problem, TrainError
from tunesmith.recipe import NAMED_REWARDS, SamplingSection

Prompts = Sequence[list[Message]]
References = Sequence[str | None]
Reward = Callable[[Prompts, Sequence[str], References], Sequence[float]]

_WHY = "training would optimize a different reward than intended"


def json_fields(_prompts: Prompts, answers: Sequence[str], references: References) -> list[float]:
    """The share of the reference's fields that have the same value in the answer: the score of `evaluate.task: json`."""
    rewards = []
    for answer, reference in zip(answers, references, strict=True):
        wanted = {} if reference is None else parse_json(reference)[1]
        fields = equal_fields(wanted, parse_json(answer)[1])
        rewards.append(sum(fields.values()) / len(fields))
    return rewards


def valid_json(_prompts: Prompts, answers: Sequence[str], _references: References) -> list[float]:
    """1 where the whole answer is one JSON value, else 0."""
    return [float(parse_json(answer)[0]) for answer in answers]


def length_window(low: int, high: int) -> Reward:
    """A reward of 1 for an answer of `low` to `high` characters; outside, it falls with the missing or surplus share."""

    def reward(_prompts: Prompts, answers: Sequence[str], _references: References) -> list[float]:
        return [_inside(len(answer), low, high) for answer in answers]

    return reward


def _inside(size: int, low: int, high: int) -> float:
    if size < low:
        return size / low
    return 1.0 if size <= high else max(0.0, 1 - (size - high) / max(high, 1))


def model_reward(folder: Path) -> Reward:
    """The reward that a model exported with `objective: reward` gives a conversation; computed in float32.

    Raises TrainError if the folder holds no reward model.
    """
    from tunesmith.inference.rewards import rewards_of
    from tunesmith.models.load import load_reward_model, load_tokenizer

    if not (folder / "reward.json").is_file():
        fix = "give the folder that `tunesmith export` wrote for a run with objective: reward"
        raise TrainError(Problem("TS303", "not the folder of an exported reward model", str(folder), _WHY, fix))
    model, template = load_reward_model(folder, dtype="float32"), ChatTemplate(load_tokenizer(folder))

    def reward(prompts: Prompts, answers: Sequence[str], _references: References) -> list[float]:
        turns = [[*p, {"role": "assistant", "content": a or " "}] for p, a in zip(prompts, answers, strict=True)]
        encoded = template.encode(turns, last_answer=True)
        for each in encoded:
            if isinstance(each, Problem):
                raise TrainError(each)
        return rewards_of(model, [each.input_ids for each in encoded if not isinstance(each, Problem)])

    return reward


def user_reward(path: Path, function: str) -> Reward:
    """A function of the user's file: `f(prompts, completions, references) -> list of numbers`. Loading it runs the file.

    Raises TrainError if there is no such file or function, or the user's code raises.
    """
    if not path.is_file():
        raise TrainError(Problem("TS303", "the file of the reward function does not exist", str(path), _WHY, "check the path"))
    if path.suffix != ".py":
        raise TrainError(Problem("TS303", "not a Python file", str(path), _WHY, "name a .py file"))
    module = ModuleType(f"tunesmith_reward_{path.stem}")
    module.__file__ = str(path)
    try:
        _FileAlone(module.__name__, str(path)).exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failure(path, error, "the file of the reward function cannot be run") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise TrainError(Problem("TS303", f"no function {function!r}", str(path), _WHY, "check the name after the colon"))

    def reward(prompts: Prompts, answers: Sequence[str], references: References) -> Sequence[float]:
        try:
            made: Sequence[float] = [float(each) for each in found(list(prompts), list(answers), list(references))]
        except Exception as error:
            raise _failure(path, error, f"the reward function {function!r} failed") from error
        return made

    return reward


class _FileAlone(SourceFileLoader):
    """Runs a file's source; never reads or writes the byte code cached next to it."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError(f"the byte code of {path} is not used")


def _failure(path: Path, error: BaseException, what: str) -> TrainError:
    """The error for a failure of the user's code, located at its last line in the file."""
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
    where = str(path) if line is None else f"{path}:{line}"
    return TrainError(Problem("TS303", f"{what}: {type(error).__name__}: {error}"[:300], where, _WHY, "correct the function"))


def make_reward(name: str) -> Reward:
    """The reward of one entry of `reward_funcs`. Raises TrainError if the entry is invalid."""
    if name in NAMED_REWARDS:
        return json_fields if name == "json-fields" else valid_json
    if name.startswith("length:"):
        match = re.fullmatch(r"length:(\d+)-(\d+)", name)
        if match is None or int(match[1]) > int(match[2]):
            raise TrainError(Problem("TS303", f"{name!r} is not a length window", "reward_funcs", _WHY, "write length:10-200"))
        return length_window(int(match[1]), int(match[2]))
    path, colon, function = name.rpartition(":")
    return user_reward(Path(path), function) if colon else model_reward(Path(name))


def make_rewards(asked: SamplingSection) -> tuple[list[Reward], list[float]]:
    """The rewards of a section and their weights."""
    rewards = [checked(name, make_reward(name)) for name in asked.reward_funcs]
    return rewards, asked.reward_weights or [1.0] * len(rewards)


def checked(name: str, reward: Reward) -> Reward:
    """The same reward; raises TrainError if it does not return one finite number per answer."""

    def call(prompts: Prompts, answers: Sequence[str], references: References) -> list[float]:
        made = [float(value) for value in reward(prompts, answers, references)]
        if len(made) != len(answers) or not all(map(math.isfinite, made)):
            what = f"{len(made)} rewards for {len(answers)} answers" if len(made) != len(answers) else "a reward is not finite"
            raise TrainError(Problem("TS303", what, name, _WHY, "return one finite number per answer"))
        return made

    return call


def check_references(asked: SamplingSection, rows: Any) -> None:
    """Raise TrainError if `json-fields` is requested and a row has no JSON object to compare with."""
    if "json-fields" not in asked.reward_funcs:
        return
    for where, reference in zip(rows["where"], rows["reference"], strict=True):
        value = None if reference is None else parse_json(reference)[1]
        if not isinstance(value, dict) or not value:
            fix = "give the row an 'answer' that is a JSON object, or use another reward"
            raise TrainError(Problem("TS303", "no JSON object to compare answers with", where, _WHY, fix))
