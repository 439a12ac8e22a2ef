"""Reads one conversation from a row in any format: messages, alpaca, sharegpt, or prompt and completion.

Each reader returns messages or a Problem; nothing is guessed or repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from tunesmith.chat.tools import calls, texts, with_tools
from tunesmith.errors import Problem

Role = Literal["system", "user", "assistant", "tool"]
Message = dict[str, Any]  # {"role": Role, "content": str}, as chat templates read it; more keys with tools (see `chat.tools`)

ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

_WHY_COLUMNS = "columns with another meaning would be trained on as if they were a conversation"


def wrong_columns(row: Mapping[str, Any], where: str, wanted: str) -> Problem:
    """The Problem of a row whose columns are not the `wanted` ones."""
    found = ", ".join(sorted(map(str, row)))[:200] or "none"
    fix = f"give rows {wanted}, or set data.format"
    return Problem("TS104", f"columns do not match, found: {found}", where, _WHY_COLUMNS, fix)


def _turns(row: Mapping[str, Any], where: str, column: str, role_key: str, text_key: str) -> list[dict[str, Any]] | Problem:
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return wrong_columns(row, where, f"with {column!r}: a list of turns")
    for turn in turns:
        if role_key not in turn or (text_key not in turn and not turn.get("tool_calls")):
            return wrong_columns(turn, f"{where} {column}", f"whose turns have {role_key!r} and {text_key!r}")
    return turns


def _from_messages(row: Mapping[str, Any], where: str) -> list[Message] | Problem:
    turns = _turns(row, where, "messages", "role", "content")
    if isinstance(turns, Problem):
        return turns
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = {"role": turn["role"], "content": turn.get("content")}
        if turn.get("tool_calls"):
            found = calls(turn["tool_calls"], f"{where} turn {number}")
            if isinstance(found, Problem):
                return found
            message |= {"content": message["content"] or "", "tool_calls": found}
        if turn["role"] == "tool" and isinstance(turn.get("name"), str):
            message["name"] = turn["name"]
        messages.append(message)
    return with_tools(messages, row.get("tools"), where)


def _from_sharegpt(row: Mapping[str, Any], where: str) -> list[Message] | Problem:
    turns = _turns(row, where, "conversations", "from", "value")
    if isinstance(turns, Problem):
        return turns
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message: Message = {"role": role_of(turn["from"]), "content": turn["value"]}
        if turn["from"] == "function_call":
            found = calls(turn["value"], f"{where} turn {number}")
            if isinstance(found, Problem):
                return found
            message |= {"content": "", "tool_calls": found}
        messages.append(message)
    return with_tools(system + messages, row.get("tools"), where)


def role_of(name: Any) -> Any:
    """The role for a sharegpt name; an unknown name is returned unchanged."""
    return SHAREGPT_ROLES.get(str(name), name)


def _from_alpaca(row: Mapping[str, Any], where: str) -> list[Message] | Problem:
    if "instruction" not in row or "output" not in row:
        return wrong_columns(row, where, "with 'instruction', 'output' and optionally 'input', 'system', 'history'")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return Problem("TS108", "'history' is not a list of [question, answer]", where, _WHY_COLUMNS, "correct the row")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = row["instruction"]
    if row.get("input") and isinstance(question, str) and isinstance(row["input"], str):
        question = f"{question}\n\n{row['input']}"
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _from_prompt(row: Mapping[str, Any], where: str) -> list[Message] | Problem:
    """TRL's format: `prompt` and `completion`, each a text or a list of messages."""
    if "prompt" not in row or "completion" not in row:
        return wrong_columns(row, where, "with 'prompt' and 'completion', and optionally 'system', 'tools'")
    turns: list[Any] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        turns += value if isinstance(value, list) else [{"role": role, "content": value}]
    return _from_messages({"messages": turns, "tools": row.get("tools")}, where)


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Any], str], list[Message] | Problem]]] = {
    "messages": ("messages", _from_messages),
    "sharegpt": ("conversations", _from_sharegpt),
    "alpaca": ("instruction", _from_alpaca),
    "prompt": ("completion", _from_prompt),
}


def detected(row: Mapping[str, Any]) -> str | None:
    """The format that `auto` detects, by the column that only that format has; None if the row has no such column."""
    return next((name for name, (column, _) in _READERS.items() if column in row), None)


def _message_problem(message: Mapping[str, Any], number: int, where: str) -> Problem | None:
    at = f"{where} turn {number}"
    role, content = message["role"], message["content"]
    if role not in ROLES:
        known = ", ".join(ROLES)
        why = "the template cannot render a turn with an unknown role"
        return Problem("TS105", f"unknown role {str(role)[:40]!r}", at, why, f"use one of: {known}")
    if not isinstance(content, str):
        why = "only text is trained on"
        return Problem("TS108", f"the content is {type(content).__name__}, not text", at, why, "write the content as a string")
    try:
        "".join(texts(message)).encode("utf-8")
    except UnicodeEncodeError:
        return Problem("TS108", "half of a surrogate pair in the text", at, "it cannot be tokenized", "repair the text")
    if role == "assistant" and not content.strip() and "tool_calls" not in message:
        why = "the model would learn to give empty answers"
        return Problem("TS106", "the assistant's answer is empty", at, why, "write the answer or delete the row")
    return None


def conversation(row: Mapping[str, Any], where: str, row_format: str) -> list[Message] | Problem:
    """The row's messages in the given format, contents not yet checked; or the Problem with its columns."""
    return _READERS[row_format][1](row, where)


def _preference_row(where: str) -> Problem:
    why = "objective: sft would train on one of the two answers, or on neither"
    fix = "set objective: dpo, or set data.format to train on the conversation in the other columns"
    return Problem("TS113", "a row with 'chosen' and 'rejected' with objective: sft", where, why, fix)


def _read_as(row: Mapping[str, Any], where: str, row_format: str) -> list[Message] | Problem:
    if row_format != "auto":
        return conversation(row, where, row_format)
    if "chosen" in row and "rejected" in row:
        return _preference_row(where)
    name = detected(row)
    if name is None:
        wanted = "as messages, sharegpt (conversations), alpaca (instruction, output) or prompt (prompt, completion)"
        return wrong_columns(row, where, wanted)
    return conversation(row, where, name)


def to_messages(
    row: Mapping[str, Any], where: str, row_format: str = "auto", system: str | None = None
) -> list[Message] | Problem:
    """The row's conversation, with `system` added first if it has no system turn; or the row's first Problem.

    `row_format` is `messages`, `sharegpt`, `alpaca`, `prompt`, or `auto` (detected by the column that only that format has; a
    preference row is refused).
    """
    messages = _read_as(row, where, row_format)
    if isinstance(messages, Problem):
        return messages
    for number, message in enumerate(messages, start=1):
        if problem := _message_problem(message, number, where):
            return problem
    if not any(message["role"] == "assistant" for message in messages):
        why = "without an answer there is nothing to train on"
        return Problem("TS107", "no assistant turn", where, why, "add the answer or delete the row")
    if system is not None and messages[0]["role"] != "system":
        added = {"role": "system", "content": system}
        if "tools" in messages[0]:  # tools stay in the first message
            added["tools"] = messages[0]["tools"]
            messages = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
        messages = [added, *messages]
    return messages
