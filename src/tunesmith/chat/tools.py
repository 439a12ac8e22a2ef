"""Tool calls in conversations, in the form that transformers' chat templates read.

An assistant turn may have `tool_calls`: [{"type": "function", "function": {"name": ..., "arguments": {...}}}], with or without
text. A turn with the role `tool` holds the result. The callable functions (`tools`, JSON schemas) are stored in the
conversation's first message under "tools".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.errors import Problem

_WHY = "the model would learn wrong calls from incomplete data"


def decoded(value: Any) -> Any:
    """A value that may be encoded as JSON text, as in many data sets; text that is not JSON is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tools_of(messages: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The functions that can be called in this conversation."""
    return messages[0].get("tools") if messages else None


def uses_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the conversation has tool calls, tool results, or callable functions."""
    return bool(tools_of(messages)) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def with_tools(messages: list[dict[str, Any]], tools: Any, where: str) -> list[dict[str, Any]] | Problem:
    """The messages, with the row's `tools` column added to the first one."""
    tools = decoded(tools)
    if not tools or not messages:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return Problem("TS108", "'tools' is not a list of functions", where, _WHY, "give a list of JSON schemas")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return [{**messages[0], "tools": wrapped}, *messages[1:]]


def calls(value: Any, where: str) -> list[dict[str, Any]] | Problem:
    """Calls in a single form, read from function objects or bare {"name", "arguments"}, arguments as text or object."""
    value = decoded(value)
    found = []
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function", each) if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return Problem("TS108", "a tool call without the function's name", where, _WHY, "give 'name' and 'arguments'")
        arguments = decoded(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            return Problem("TS108", "a tool call's arguments are not a JSON object", where, _WHY, "write them as an object")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not found:
        return Problem("TS108", "'tool_calls' is empty", where, _WHY, "remove it, or add the call")
    return found


def texts(value: Any) -> list[str]:
    """All texts in a JSON value, including keys: everything that a template may write."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts(part)]
    return []
