"""What a check says of a row. A finding names a rule and counts or places, never content: findings are written to logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.recipe import Action

#: {"role": ..., "content": text}; what else a turn holds is kept as it is.
Message = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One rule that a row met; `detail` holds counts and places alone."""

    rule: str
    action: Action
    detail: str


def texts(messages: Sequence[Message], *roles: str) -> Iterable[tuple[int, str]]:
    """The contents that are text, with the number of their turn (from 1); of these roles, or of all."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if isinstance(content, str) and (not roles or message.get("role") in roles):
            yield number, content


def last_answer(messages: Sequence[Message]) -> str:
    """The text of the last assistant turn; empty where there is none."""
    return next((text for _, text in reversed(list(texts(messages, "assistant")))), "")


def places(counts: dict[int, int]) -> str:
    """`3 in turn 1, 1 in turn 4`."""
    return ", ".join(f"{count} in turn {turn}" for turn, count in sorted(counts.items()))
