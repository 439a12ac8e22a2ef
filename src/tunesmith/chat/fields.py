"""Compares a JSON answer with a reference, both for the scores of `evaluate` and for rewards during training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def parse_json(text: str) -> tuple[bool, Any]:
    """Whether the whole text is one JSON value, and the value."""
    try:
        return True, json.loads(text)
    except (ValueError, RecursionError):
        return False, None


def equal_fields(wanted: Mapping[str, Any], value: Any) -> dict[str, bool]:
    """For each field of the reference, whether the answer's JSON object has it with the same value."""
    got = value if isinstance(value, dict) else {}
    return {name: name in got and canonical(got[name]) == canonical(want) for name, want in wanted.items()}


def canonical(value: Any) -> str:
    """The same text for all spellings of a JSON value: 1 equals 1.0, true is not a number, key order is ignored."""
    try:
        return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)
    except RecursionError:
        return f"nested too deeply, at {id(value)}"  # equals nothing else


def _number(text: str) -> float | int:
    return int(float(text)) if float(text).is_integer() else float(text)
