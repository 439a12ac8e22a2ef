"""Rows with one judged answer (KTO), and rows with prompts for which answers are sampled (GRPO, RLOO, PPO).

judged    `prompt` (text or messages), `completion` (text, a turn or turns) and `label` (true or false); or a conversation
          in any SFT format with an additional `label`
prompt    `prompt` (text or messages), with an optional `answer` that rewards compare against; or a conversation in any
          SFT format, whose last answer is the reference; or `messages` that end with the question
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.chat.formats import Message, to_messages, wrong_columns
from tunesmith.errors import Problem

_WANTED_JUDGED = "with 'prompt', 'completion' and 'label', or a conversation with 'label'"
_WANTED_PROMPT = "with 'prompt' and optionally 'answer', or a conversation"


@dataclass(frozen=True)
class Judged:
    """A conversation whose last turn is an answer, and whether that answer is desirable."""

    messages: list[Message]
    label: bool


@dataclass(frozen=True)
class Asked:
    """A conversation that ends with a question, and the reference answer if the row has one."""

    prompt: list[Message]
    reference: str | None

    @property
    def messages(self) -> list[Message]:
        """The prompt, followed by the reference answer if there is one."""
        answer = [] if self.reference is None else [{"role": "assistant", "content": self.reference}]
        return [*self.prompt, *answer]


def to_judged(row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None) -> Judged | Problem:
    """The row's judged answer, or its first Problem; the label must be a JSON boolean, nothing is converted to one."""
    if "label" not in row:
        return _wrong(row, where, "kto", _WANTED_JUDGED)
    label = row["label"]
    if not isinstance(label, bool):
        why = "the label decides the direction of the gradient"
        return Problem("TS108", f"'label' is {label!r:.40}, not true or false", where, why, "write true or false")
    if "completion" in row and "prompt" in row:
        turns = _turns(row["prompt"], "user") + _turns(row["completion"], "assistant")
        messages = _checked(turns, where, system)
    else:
        messages = to_messages(row, where, row_format, system)
    if isinstance(messages, Problem):
        return messages
    return _ends_with_answer(messages, where) or Judged(messages, label)


def judged_or_plain(
    row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None
) -> Judged | list[Message] | Problem:
    """A test row: a judged answer if it has a label, else a plain conversation."""
    read = to_judged if "label" in row else to_messages
    return read(row, where, row_format, system)


def to_asked(row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None) -> Asked | Problem:
    """The row's prompt and reference, or its first Problem."""
    if "label" in row or ("chosen" in row and "rejected" in row):
        return _wrong(row, where, "grpo, rloo or ppo", _WANTED_PROMPT)
    messages = _conversation(row, where, row_format, system)
    if isinstance(messages, Problem):
        return messages
    reference = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    prompt = messages if reference is None else messages[:-1]
    if not prompt or prompt[-1]["role"] != "user":
        why = "answers are sampled for a question"
        return Problem("TS112", "there is no question before the answer", where, why, "end the prompt with a user turn")
    return Asked(prompt, reference)


def _conversation(row: Mapping[str, Any], where: str, row_format: str, system: str | None) -> list[Message] | Problem:
    if "prompt" in row:
        answer = row.get("answer")
        turns = _turns(row["prompt"], "user") + ([] if answer is None else _turns(answer, "assistant"))
        return _checked(turns, where, system)
    given = row.get("messages")
    if isinstance(given, list) and given and isinstance(given[-1], dict) and given[-1].get("role") == "user":
        return _checked(given, where, system)
    return to_messages(row, where, row_format, system)


def _turns(value: Any, role: str) -> list[Any]:
    """A text as one turn of `role`; a turn or a list of turns unchanged."""
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": role, "content": value}]


def _checked(turns: list[Any], where: str, system: str | None) -> list[Message] | Problem:
    """The turns as messages, checked like a conversation; they need not end with an answer."""
    if not turns:
        return wrong_columns({}, where, _WANTED_PROMPT)
    answer = {"role": "assistant", "content": "-"}  # a placeholder for the answer that will be sampled
    found = to_messages({"messages": [*turns, answer]}, where, "messages", system)
    return found if isinstance(found, Problem) else found[:-1]


def _ends_with_answer(messages: list[Message], where: str) -> Problem | None:
    if messages[-1]["role"] != "assistant":
        why = "only an answer can be judged"
        return Problem("TS107", "the conversation does not end with an assistant turn", where, why, "add the answer")
    if len(messages) < 2 or messages[-2]["role"] != "user":
        why = "the loss judges an answer to a question"
        return Problem("TS112", "there is no question before the answer", where, why, "add it")
    return None


def _wrong(row: Mapping[str, Any], where: str, objective: str, wanted: str) -> Problem:
    found = ", ".join(sorted(map(str, row)))[:100] or "none"
    why = "the meaning of a row's columns depends on the objective"
    return Problem("TS113", f"columns {found} with objective: {objective}", where, why, f"give rows {wanted}")
