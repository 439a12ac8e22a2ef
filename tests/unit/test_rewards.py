"""Rewards: text in, numbers out; invalid rewards are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError, TrainError
from tunesmith.evaluation.metrics import Answer, score_json
from tunesmith.recipe import GrpoSection, PpoSection, absolute_reward, parse_recipe
from tunesmith.stages.train.loops.rewards import check_references, make_reward, make_rewards

PROMPTS = [[{"role": "user", "content": "?"}]] * 3
REFERENCE = '{"a": 1, "b": "x"}'


def test_json_fields_are_scored_as_evaluate_does() -> None:
    answers = ['{"a": 1, "b": "y"}', REFERENCE, "a: 1"]
    found = make_reward("json-fields")(PROMPTS, answers, [REFERENCE] * 3)
    assert list(found) == [0.5, 1.0, 0.0]
    assert list(found) == [score_json(Answer("", REFERENCE, text), None)["score"] for text in answers]


def test_valid_json() -> None:
    assert list(make_reward("valid-json")(PROMPTS, ["[1]", "[1", "1 2"], [None] * 3)) == [1.0, 0.0, 0.0]


def test_a_window_of_lengths() -> None:
    found = make_reward("length:4-8")(PROMPTS, ["ab", "abcdef", "a" * 10], [None] * 3)
    assert list(found) == [0.5, 1.0, 0.75]


def test_a_function_of_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, completions, references):\n    return [len(c) for c in completions]\n")
    name = absolute_reward("mine.py:f", tmp_path)
    assert list(make_reward(name)(PROMPTS, ["a", "bb", ""], [None] * 3)) == [1, 2, 0]
    assert absolute_reward("valid-json", tmp_path) == "valid-json"
    assert absolute_reward("run/export/merged", tmp_path) == str(tmp_path / "run/export/merged")


@pytest.mark.parametrize("name", ["length:8-4", "length:x", "none.py:f", "mine.py:g", "folder"])
def test_what_is_no_reward_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("f = 1\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrainError, match="TS303"):
        make_reward(absolute_reward(name, tmp_path))


@pytest.mark.parametrize("body", ["[1.0]", "[float('nan')] * 3"])
def test_what_is_no_number_for_each_answer_is_refused(body: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def f(prompts, completions, references):\n    return {body}\n")
    (reward,), weights = make_rewards(PpoSection(reward_funcs=[absolute_reward("mine.py:f", tmp_path)]))
    assert weights == [1.0]
    with pytest.raises(TrainError, match="TS303"):
        reward(PROMPTS, ["a", "b", "c"], [None] * 3)


@pytest.mark.parametrize(
    ("source", "where", "what"),
    [
        ("def f(p, c, r):\n    return [1 / 0]\n", "mine.py:2", "ZeroDivisionError"),
        ("def f(p, c, r):\n    return None\n", "mine.py", "TypeError"),
        ("def f(p, c, r):\n    return ['good']\n", "mine.py", "ValueError"),
        ("x = {}['y']\n", "mine.py:1", "KeyError"),
        ("def f(:\n", "mine.py:1", "SyntaxError"),
        ("raise SystemExit(3)\n", "mine.py:1", "SystemExit"),
    ],
)
def test_what_fails_in_the_users_file_is_told_with_its_line(source: str, where: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(TrainError) as caught:
        make_reward(absolute_reward("mine.py:f", tmp_path))(PROMPTS[:1], ["a"], [None])
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path / where)
    assert what in problem.what


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize(
    ("section", "told"),
    [("{}", "no reward"), ("{reward_funcs: [valid-json], reward_weights: [1, 2]}", "2 weights for 1 rewards")],
)
def test_no_reward_or_weights_that_do_not_fit_are_refused(objective: str, section: str, told: str) -> None:
    text = f"model: m\nobjective: {objective}\n{objective}: {section}\ndata: {{train: t}}"
    with pytest.raises(RecipeError, match=told) as caught:
        parse_recipe(text, "r", Path())
    assert caught.value.problems[0].code == "TS303"


@pytest.mark.parametrize("reference", [None, "red", "{}"])
def test_json_fields_need_references(reference: str | None) -> None:
    rows = {"where": ["f:1", "f:2"], "reference": [REFERENCE, reference]}
    with pytest.raises(TrainError, match="f:2"):
        check_references(GrpoSection(reward_funcs=["json-fields"]), rows)
    check_references(GrpoSection(reward_funcs=["valid-json"]), rows)
