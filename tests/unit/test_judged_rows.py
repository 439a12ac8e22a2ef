"""Judged answers and prompts from rows, and which keys belong to which objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat.judged import Asked, Judged, to_asked, to_judged
from tunesmith.errors import Problem, RecipeError, TrainError
from tunesmith.hardware import detect
from tunesmith.recipe import OBJECTIVES, Recipe, parse_recipe
from tunesmith.stages.train import loops
from tunesmith.stages.train.loops.padded import settle_padded

USER, GOOD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"messages": [USER, GOOD], "label": True},
        {"instruction": "Hi", "output": "Hello", "label": True},
    ],
)
def test_judged_rows_say_the_same(row: dict[str, Any]) -> None:
    assert to_judged(row, "f:1") == Judged([USER, GOOD], label=True)
    assert to_judged(row, "f:1", "auto", "S") == Judged([SYSTEM, USER, GOOD], label=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, Asked([USER], None)),
        ({"prompt": [USER], "answer": "Hello"}, Asked([USER], "Hello")),
        ({"messages": [USER]}, Asked([USER], None)),
        ({"messages": [USER, GOOD]}, Asked([USER], "Hello")),
        ({"instruction": "Hi", "output": "Hello"}, Asked([USER], "Hello")),
    ],
)
def test_prompts_say_the_same(row: dict[str, Any], expected: Asked) -> None:
    assert to_asked(row, "f:1") == expected


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("TS113", {"prompt": "Hi", "completion": "Hello"}),
        ("TS113", {"prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("TS108", {"prompt": "Hi", "completion": "Hello", "label": 1}),
        ("TS108", {"prompt": "Hi", "completion": "Hello", "label": None}),
        ("TS108", {"prompt": 3, "completion": "Hello", "label": True}),
        ("TS106", {"prompt": "Hi", "completion": " ", "label": True}),
        ("TS112", {"prompt": [], "completion": "Hello", "label": True}),
        ("TS107", {"messages": [USER, GOOD, USER], "label": True}),
    ],
)
def test_problems_of_judged_rows(code: str, row: dict[str, Any]) -> None:
    problem = to_judged(row, "f:7")
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where[:3]) == (code, "f:7")


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("TS113", {"prompt": "Hi", "completion": "Hello", "label": True}),
        ("TS113", {"prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("TS104", {"text": "Hi"}),
        ("TS104", {"prompt": []}),
        ("TS108", {"prompt": 3}),
        ("TS106", {"prompt": "Hi", "answer": ""}),
        ("TS112", {"prompt": [SYSTEM]}),
        ("TS112", {"prompt": [SYSTEM], "answer": "Hello"}),
    ],
)
def test_problems_of_prompts(code: str, row: dict[str, Any]) -> None:
    problem = to_asked(row, "f:7")
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where[:3]) == (code, "f:7")


def recipe(text: str) -> Recipe:
    return parse_recipe(f"model: m\nmethod: lora\ndata: {{train: t.jsonl}}\n{text}", "r.yaml", Path("/")).recipe


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("objective: orpo\nkto: {beta: 0.2}", "kto"),
        ("ppo: {gamma: 0.9}", "ppo"),
        ("objective: kto\ntrain: {optimizer_in_backward: true}", "optimizer_in_backward"),
        ("objective: grpo\ntrain: {eval_steps: 5}", "eval_steps"),
        ("objective: ppo\ntrain: {neftune_noise_alpha: 5}", "neftune_noise_alpha"),
        ("objective: reward\ntrain: {per_device_max_tokens: 100}", "per_device_max_tokens"),
        ("objective: rloo\nlora: {lora_dropout: 0.1}", "lora_dropout"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(text)


def test_batches_are_whole_groups() -> None:
    hardware = detect()
    settings = settle_padded(recipe("objective: grpo\ngrpo: {num_generations: 6, reward_funcs: [valid-json]}"), 100, hardware)
    assert settings.effective_batch_size % 6 == 0
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == settings.effective_batch_size
    assert settings.per_device_train_batch_size <= 8
    assert settings.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("objective: grpo\ngrpo: {reward_funcs: [valid-json]}\ntrain: {effective_batch_size: 12}", "groups of 8"),
        (
            "objective: rloo\nrloo: {reward_funcs: [valid-json]}\ntrain: {effective_batch_size: 64}",
            "32 prompts per step, but there are 10",
        ),
        ("objective: kto\ntrain: {per_device_train_batch_size: 1}", "one row per micro-batch"),
    ],
)
def test_batches_that_cannot_be_are_refused(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle_padded(recipe(text), 10, detect())


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainError, match=r"tunesmith\[trl\]"):
        loops.loop_of(OBJECTIVES["kto"])
