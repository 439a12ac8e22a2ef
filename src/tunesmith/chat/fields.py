"""How one JSON answer compares with a reference: for the scores of `evaluate` and for rewards while training alike."""

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
    """For each field of the reference whether the answer's value, a JSON object, has it with the same value."""
    got = value if isinstance(value, dict) else {}
    return {name: name in got and got[name] == want for name, want in wanted.items()}
