r"""Reads preference pairs from rows in any format: a prompt, the chosen answer and the rejected answer.

Formats, detected by their columns (`data.format: auto`) or named as for conversations:

    messages   `chosen` and `rejected`, each text or a list of messages; `prompt` (text or messages), or no prompt if both
               sides are whole conversations that differ only in their last answer
    sharegpt   `conversations` as the prompt, `chosen` and `rejected` as {from, value} (LLaMA-Factory's form)
    alpaca     `instruction`, `input`, `system`, `history` as the prompt, `chosen` and `rejected` as text

Text in the form of hh-rlhf ("\n\nHuman: ... \n\nAssistant: ...") is split into turns. Nothing is guessed or repaired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.chat.formats import Message, conversation, role_of, to_messages, wrong_columns
from tunesmith.errors import Problem

SIDES = ("chosen", "rejected")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_WANTED = "with 'chosen' and 'rejected', and their prompt"


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ only in the final assistant answer."""

    chosen: list[Message]
    rejected: list[Message]


def to_pair(row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None) -> Pair | Problem:
    """The row's pair, with `system` added first if it has no system turn; or the row's first Problem.

    `row_format` is `messages`, `sharegpt`, `alpaca`, or `auto` (detected by the column that only that format has).
    """
    if problem := _missing_side(row, where):
        return problem
    sides = []
    for side in SIDES:
        conversations = _conversation(row, where, side, row_format)
        if isinstance(conversations, Problem):
            return conversations
        messages = to_messages({"messages": conversations}, f"{where} {side}", "messages", system)
        if isinstance(messages, Problem):
            return messages
        sides.append(messages)
    pair = Pair(*sides)
    return _pair_problem(pair, where) or pair


def chosen_messages(
    row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None
) -> list[Message] | Problem:
    """A test row: the chosen side of a preference row, or a plain conversation."""
    if not all(side in row for side in SIDES):
        return to_messages(row, where, row_format, system)
    pair = to_pair(row, where, row_format, system)
    return pair if isinstance(pair, Problem) else pair.chosen


def _missing_side(row: Mapping[str, Any], where: str) -> Problem | None:
    missing = [side for side in SIDES if row.get(side) is None]
    if len(missing) == len(SIDES):
        why = "a preference needs a chosen and a rejected answer"
        fix = f"give rows {_WANTED}, or train with another objective"
        return Problem(
            "TS113", "a row without 'chosen' and 'rejected' for an objective on pairs (dpo, orpo, reward)", where, why, fix
        )
    if missing:
        why = "a single answer expresses no preference"
        return Problem("TS110", f"the side {missing[0]!r} is missing", where, why, "add it or delete the row")
    return None


def _conversation(row: Mapping[str, Any], where: str, side: str, row_format: str) -> list[Message] | Problem:
    """Prompt and answer of one side as messages, contents not yet checked."""
    if row_format == "auto":
        row_format = "sharegpt" if "conversations" in row else "alpaca" if "instruction" in row else "messages"
    if row_format == "messages":
        return _with_prompt(row, where, side)
    answer = _answer(row[side], where, side)
    alpaca = row_format == "alpaca"
    prompt = conversation({**row, "output": ""} if alpaca else row, where, row_format)
    if isinstance(prompt, Problem) or isinstance(answer, Problem):
        return prompt if isinstance(prompt, Problem) else answer
    return [*(prompt[:-1] if alpaca else prompt), *answer]


def _answer(value: Any, where: str, side: str) -> list[Message] | Problem:
    """An answer as messages: text, one turn, or a list of turns, with the keys of transformers or of sharegpt."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = value if isinstance(value, list) else [value]
    messages: list[Message] = []
    for turn in turns:
        if isinstance(turn, dict) and "role" in turn and "content" in turn:
            messages.append({"role": turn["role"], "content": turn["content"]})
        elif isinstance(turn, dict) and "from" in turn and "value" in turn:
            messages.append({"role": role_of(turn["from"]), "content": turn["value"]})
        else:
            why = "each side must be an answer"
            fix = f"give {side!r} as text, or as turns with 'role' and 'content'"
            return Problem("TS108", f"{side!r} is neither text nor turns", where, why, fix)
    return messages


def _with_prompt(row: Mapping[str, Any], where: str, side: str) -> list[Message] | Problem:
    """`prompt` followed by one side, or one side that is a whole conversation."""
    prompt, answer = row.get("prompt"), row[side]
    if isinstance(answer, str) and (prompt is None or isinstance(prompt, str)):
        turns = _hh_turns((prompt or "") + answer)
        if turns is not None:
            return turns
    messages = _answer(answer, where, side)
    if isinstance(messages, Problem):
        return messages
    whole = bool(messages) and messages[0]["role"] in {"system", "user"}
    if prompt is None:
        return messages if whole else _no_prompt(row, where)
    if whole:
        # UltraFeedback repeats the conversation's question as `prompt`.
        repeated = isinstance(prompt, str) and any(message["content"] == prompt for message in messages[:-1])
        return messages if repeated else _different(where, f"{side!r} is a whole conversation that does not contain the prompt")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _answer(prompt, where, "prompt")
    return asked if isinstance(asked, Problem) else [*asked, *messages]


def _no_prompt(row: Mapping[str, Any], where: str) -> Problem:
    return wrong_columns(row, where, f"{_WANTED}: a 'prompt', or both sides as whole conversations")


def _hh_turns(text: str) -> list[Message] | None:
    """The turns of hh-rlhf's text (Bai et al. 2022, arXiv 2204.05862), trimmed; None if the text is not in that form."""
    parts = _HH_TURN.split(text)
    if len(parts) == 1 or parts[0].strip():
        return None
    names, contents = parts[1::2], parts[2::2]
    return [{"role": _HH_ROLES[name], "content": content.strip()} for name, content in zip(names, contents, strict=True)]


def _pair_problem(pair: Pair, where: str) -> Problem | None:
    """Why two conversations do not form a pair; None if they do."""
    for side, messages in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
        if messages[-1]["role"] != "assistant":
            why = "each side must end with an answer"
            return Problem("TS107", f"{side!r} does not end with an assistant turn", where, why, "add the answer")
    if pair.chosen == pair.rejected:
        return equal_answers(where)
    if pair.chosen[:-1] != pair.rejected[:-1]:
        return _different(where, "chosen and rejected differ before their last answer")
    if not pair.chosen[:-1]:
        return _different(where, "there is no prompt before the answers")
    return None


def equal_answers(where: str) -> Problem:
    """The Problem of a pair with two equal answers."""
    why = "equal answers give no preference and no gradient"
    return Problem("TS111", "chosen and rejected are the same", where, why, "correct the row or delete it")


def _different(where: str, what: str) -> Problem:
    why = "the loss compares two answers to the same prompt"
    return Problem("TS112", what, where, why, "give both sides the same prompt, and one answer each")
