"""Scores of generated answers, per row and over a set. No model: text in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for

from tunesmith.chat.fields import canonical, equal_fields, parse_json
from tunesmith.errors import EvaluateError, Problem


@dataclass(frozen=True)
class Answer:
    """A test row's reference and the model's answer. `where` names the row."""

    where: str
    reference: str
    answer: str


def schema_validator(schema: Any, source: str) -> Any:
    """A validator for the schema's own draft. Raises EvaluateError if the schema itself is invalid."""
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        why = "no answer could be validated against it"
        raise EvaluateError(Problem("TS501", f"not a valid JSON Schema: {error.message}", source, why, "correct it")) from error
    return kind(schema)


def reference_fields(answer: Answer) -> dict[str, Any]:
    """The reference's fields. Raises EvaluateError if it is not a non-empty JSON object."""
    ok, value = parse_json(answer.reference)
    if not ok or not isinstance(value, dict) or not value:
        why = "fields are scored one by one against the reference"
        fix = "write references as JSON objects, or set evaluate.task: text"
        raise EvaluateError(Problem("TS503", "the reference answer is not a JSON object", answer.where, why, fix))
    return value


def score_json(answer: Answer, validator: Any | None) -> dict[str, Any]:
    """One row: whether it parses, whether it matches the schema, which fields equal the reference, their mean as `score`."""
    wanted = reference_fields(answer)
    parsed, value = parse_json(answer.answer)
    got = value if isinstance(value, dict) else {}
    fields = equal_fields(wanted, value)
    return {
        "parsed": parsed,
        "valid": parsed and validator is not None and bool(validator.is_valid(value)),
        "fields": fields,
        "predicted": got,
        "wanted": wanted,
        "score": sum(fields.values()) / len(fields),
    }


def score_text(answer: Answer) -> dict[str, Any]:
    """One row: 1 if the answer equals the reference, ignoring surrounding blanks, else 0."""
    return {"score": float(answer.answer.strip() == answer.reference.strip())}


def summarise_json(scores: Sequence[dict[str, Any]], label: str | None, has_schema: bool) -> dict[str, Any]:
    """Rates over all rows; `field_accuracy` per field over the rows whose reference has it; macro-F1 of `label`.

    Macro-F1 is the unweighted mean over the classes that occur in the references (scikit-learn); a missing
    answer, or one of another class, counts against the reference class.
    """
    total = len(scores)
    names = sorted({name for score in scores for name in score["fields"]})
    accuracy = {}
    for name in names:
        hits = [score["fields"][name] for score in scores if name in score["fields"]]
        accuracy[name] = sum(hits) / len(hits)
    return {
        "task_score": sum(score["score"] for score in scores) / total,
        "json_parse_rate": sum(score["parsed"] for score in scores) / total,
        "schema_valid_rate": sum(score["valid"] for score in scores) / total if has_schema else None,
        "field_accuracy": accuracy,
        "macro_f1": macro_f1(scores, label) if label is not None else None,
    }


def macro_f1(scores: Sequence[dict[str, Any]], label: str) -> float:
    """Macro-F1 of one field; values are compared as JSON, so null and numbers are classes too."""
    from sklearn.metrics import f1_score

    if not all(label in score["wanted"] for score in scores):
        why = "evaluate.label asks for its macro-F1"
        raise EvaluateError(Problem("TS503", f"references without a field {label!r}", "evaluate.label", why, "check the name"))
    missing = "\0"  # not valid JSON, so it equals no reference
    truth = [canonical(score["wanted"][label]) for score in scores]
    guess = [canonical(score["predicted"][label]) if label in score["predicted"] else missing for score in scores]
    return float(f1_score(truth, guess, labels=sorted(set(truth)), average="macro", zero_division=0))
