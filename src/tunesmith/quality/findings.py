"""Findings of the checks. A finding names a rule, with counts or places but never content, because findings are logged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.recipe import Action

#: {"role": ..., "content": text}; other keys of a turn are kept unchanged.
Message = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One rule that matched a row; `detail` holds only counts and places."""

    rule: str
    action: Action
    detail: str


def texts(messages: Sequence[Message], *roles: str) -> Iterable[tuple[int, str]]:
    """(turn number from 1, content) of each turn whose content is text, for these roles or for all."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if isinstance(content, str) and (not roles or message.get("role") in roles):
            yield number, content


def last_answer(messages: Sequence[Message]) -> str:
    """The text of the last assistant turn; empty if there is none."""
    return next((text for _, text in reversed(list(texts(messages, "assistant")))), "")


def places(counts: dict[int, int]) -> str:
    """`3 in turn 1, 1 in turn 4`."""
    return ", ".join(f"{count} in turn {turn}" for turn, count in sorted(counts.items()))
