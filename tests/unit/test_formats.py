"""Rows to conversations: three formats, and an error code for everything else."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.chat.columns import mapped
from tunesmith.chat.formats import to_messages
from tunesmith.errors import Problem

EXPECTED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("given_format", ["auto", None])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": EXPECTED}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("prompt", {"prompt": "Hi", "completion": "Hello"}),
        ("prompt", {"prompt": EXPECTED[:1], "completion": EXPECTED[1:]}),
    ],
)
def test_three_formats_say_the_same(name: str, row: dict[str, Any], given_format: str | None) -> None:
    assert to_messages(row, "f:1", given_format or name) == EXPECTED


def test_alpaca_parts() -> None:
    row = {"system": "S", "history": [["q", "a"]], "instruction": "Sum", "input": "1 2", "output": "3"}
    assert to_messages(row, "f:1") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Sum\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_system_is_added_only_where_it_is_missing() -> None:
    with_system = [{"role": "system", "content": "own"}, *EXPECTED]
    assert to_messages({"messages": EXPECTED}, "f:1", system="S") == [{"role": "system", "content": "S"}, *EXPECTED]
    assert to_messages({"messages": with_system}, "f:1", system="S") == with_system


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("TS104", {"text": "x"}),
        ("TS104", {"messages": "x"}),
        ("TS104", {"messages": [{"role": "user"}]}),
        ("TS104", {"conversations": [{"role": "user", "content": "x"}]}),
        ("TS104", {"instruction": "x"}),
        ("TS105", {"messages": [{"role": "gpt", "content": "x"}]}),
        ("TS105", {"messages": [{"role": ["user"], "content": "x"}]}),
        ("TS105", {"conversations": [{"from": "narrator", "value": "x"}]}),
        ("TS106", {"messages": [EXPECTED[0], {"role": "assistant", "content": " \n"}]}),
        ("TS107", {"messages": [EXPECTED[0]]}),
        ("TS107", {"messages": []}),
        ("TS108", {"messages": [{"role": "user", "content": None}]}),
        ("TS108", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("TS108", {"instruction": "x", "output": 3}),
        ("TS108", {"instruction": "x", "output": "y", "history": [["only"]]}),
    ],
)
def test_problems_are_coded_and_placed(code: str, row: dict[str, Any]) -> None:
    problem = to_messages(row, "f:7")
    assert isinstance(problem, Problem)
    assert problem.code == code
    assert problem.where.startswith("f:7")


def test_named_format_is_not_guessed() -> None:
    problem = to_messages({"messages": EXPECTED}, "f:1", "alpaca")
    assert isinstance(problem, Problem)
    assert problem.code == "TS104"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_tool_calls_have_one_form() -> None:
    expected = [
        {"role": "user", "content": "Rain?", "tools": TOOLS},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "No."},
    ]
    turns = [
        ("human", "Rain?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("observation", "sun"),
        ("gpt", "No."),
    ]
    sharegpt = {
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "tools": '[{"name": "weather", "parameters": {}}]',
    }
    assert to_messages(sharegpt, "f:1") == expected
    texted = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    plain = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [texted]}, *expected[2:]]
    assert to_messages({"messages": plain, "tools": TOOLS}, "f:1") == expected
    with_system = to_messages({"messages": plain, "tools": TOOLS}, "f:1", system="S")
    assert isinstance(with_system, list)
    assert [message.get("tools") for message in with_system] == [TOOLS, None, None, None, None]


@pytest.mark.parametrize("call", [{"name": 3}, {"name": "f", "arguments": "no object"}, "text"])
def test_bad_tool_calls_are_problems(call: Any) -> None:
    problem = to_messages({"messages": [EXPECTED[0], {"role": "assistant", "tool_calls": [call]}]}, "f:1")
    assert isinstance(problem, Problem)
    assert problem.code == "TS108"


def test_columns_are_mapped() -> None:
    row = {"question": "Hi", "answer": "Hello", "id": 3}
    columns = {"prompt": "question", "completion": "answer"}
    assert mapped(row, columns, "f:1") == {"id": 3, "prompt": "Hi", "completion": "Hello"}
    problem = mapped({"question": "Hi"}, columns, "f:1")
    assert isinstance(problem, Problem)
    assert problem.code == "TS104"


def test_columns_are_written_by_templates() -> None:
    row = {"text": "Ada in Rome", "entities": [{"type": "city", "text": "R\u00f6me"}], "0": "x"}
    columns = {"prompt": "text", "completion": "{{ entities | tojson }} {{ row['0'] }}"}
    made = mapped(row, columns, "f:1")
    assert isinstance(made, dict)
    assert made["prompt"] == "Ada in Rome"
    assert made["completion"] == '[{"type": "city", "text": "R\u00f6me"}] x'
    for broken in ({"text": "x"}, {"text": "x", "entities": [], "row": 1}, {"text": "x", "entities": {1, 2}, "0": ""}):
        problem = mapped(broken, columns, "f:1")
        assert isinstance(problem, Problem)
        assert (problem.code, problem.where) == ("TS104", "f:1")


def test_a_template_reaches_nothing_but_the_row() -> None:
    problem = mapped({"text": "x"}, {"prompt": "{{ text.__class__.__mro__ }}"}, "f:1")
    assert isinstance(problem, Problem)
    problem = mapped({"text": ["x"]}, {"prompt": "{{ text.append(1) }}"}, "f:1")
    assert isinstance(problem, Problem)
