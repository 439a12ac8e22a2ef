"""Scores of hand-written answers with known scores."""

from __future__ import annotations

import json

import pytest

from tunesmith.errors import EvaluateError
from tunesmith.evaluation.metrics import Answer, macro_f1, schema_validator, score_json, score_text, summarise_json

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": ["integer", "null"]}},
    "required": ["a", "b"],
}


def answer(text: str, a: str = "x", b: int | None = None) -> Answer:
    return Answer("f:1", json.dumps({"a": a, "b": b}), text)


def test_rows() -> None:
    validator = schema_validator(SCHEMA, "s.json")
    right = score_json(answer('{"a": "x", "b": null}'), validator)
    assert (right["parsed"], right["valid"], right["score"]) == (True, True, 1.0)
    half = score_json(answer('{"a": "x"}'), validator)  # a missing field is not null
    assert (half["parsed"], half["valid"], half["score"]) == (True, False, 0.5)
    for text in ("", "Sure! {}", '{"a": "x", "b": null} ok', '["x"]', "3"):
        assert score_json(answer(text), validator)["score"] == 0.0
    assert score_json(answer("3"), validator)["parsed"]


def test_numbers_are_not_booleans_or_text() -> None:
    assert score_json(answer('{"a": "x", "b": "1"}', b=1), None)["score"] == 0.5


def test_summary() -> None:
    scores = [
        score_json(answer(text), None)
        for text in ('{"a": "x", "b": null}', '{"a": "y", "b": null}', "no", '{"a": "x", "b": 1}')
    ]
    summary = summarise_json(scores, "a", has_schema=False)
    assert summary["task_score"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert summary["json_parse_rate"] == 0.75
    assert summary["field_accuracy"] == {"a": 0.5, "b": 0.5}
    assert summary["schema_valid_rate"] is None


def test_macro_f1_by_hand() -> None:
    rows = [("x", '{"a": "x"}'), ("x", '{"a": "y"}'), ("y", '{"a": "y"}'), ("y", "no")]
    scores = [score_json(answer(text, a=truth), None) for truth, text in rows]
    # x: precision 1, recall 1/2, F1 2/3; y: precision 1/2, recall 1/2, F1 1/2
    assert macro_f1(scores, "a") == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_errors() -> None:
    with pytest.raises(EvaluateError, match="not a JSON object"):
        score_json(Answer("f:3", "plain text", "{}"), None)
    with pytest.raises(EvaluateError, match="not a valid JSON Schema"):
        schema_validator({"type": "no-such-type"}, "s.json")
    with pytest.raises(EvaluateError, match="without a field"):
        macro_f1([score_json(answer("{}"), None)], "intent")


def test_text_score() -> None:
    assert score_text(Answer("f", "Paris", " Paris\n"))["score"] == 1.0
    assert score_text(Answer("f", "Paris", "paris"))["score"] == 0.0
