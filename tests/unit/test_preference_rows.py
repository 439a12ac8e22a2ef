"""Preference rows to pairs: all forms give the same pairs, and anything else gets an error code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat.formats import to_messages
from tunesmith.chat.preference import Pair, chosen_messages, to_pair
from tunesmith.errors import Problem
from tunesmith.io.rows import read_rows

USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "What?"},
)
EXPECTED = Pair([USER, GOOD], [USER, BAD])
TOLD = {"from": "human", "value": "Hi"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "text with a prompt": ("messages", {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}),
    "messages with a prompt": ("messages", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    "one message each": ("messages", {"prompt": [USER], "chosen": GOOD, "rejected": BAD}),
    "whole conversations": ("messages", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    "whole conversations and the question": ("messages", {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    "hh-rlhf": (
        "messages",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
    ),
    "hh-rlhf, prompt apart": ("messages", {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " What?"}),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [TOLD],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ),
    "alpaca": ("alpaca", {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "What?"}),
}


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_say_the_same(form: str, auto: bool) -> None:
    row_format, row = FORMS[form]
    assert to_pair(row, "f:1", "auto" if auto else row_format) == EXPECTED
    assert chosen_messages(row, "f:1") == EXPECTED.chosen


def test_longer_conversations_and_systems() -> None:
    before = [{"role": "system", "content": "S"}, USER, GOOD, {"role": "user", "content": "And?"}]
    found = to_pair({"chosen": [*before, GOOD], "rejected": [*before, BAD]}, "f:1", system="other")
    assert found == Pair([*before, GOOD], [*before, BAD])
    with_system = to_pair({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, "f:1", system="S")
    assert with_system == Pair([before[0], USER, GOOD], [before[0], USER, BAD])
    alpaca = {"system": "S", "history": [["Hi", "Hello"]], "instruction": "And?", "chosen": "Hello", "rejected": "What?"}
    assert to_pair(alpaca, "f:1") == found


def test_text_of_an_answer_is_not_cut_into_turns() -> None:
    found = to_pair({"prompt": "Hi", "chosen": "Hello\n\nHuman: no", "rejected": "What?"}, "f:1")
    assert isinstance(found, Pair)
    assert found.chosen[-1]["content"] == "Hello\n\nHuman: no"


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("TS104", {"chosen": "Hello", "rejected": "What?"}),
        ("TS104", {"chosen": [GOOD], "rejected": [BAD]}),
        ("TS105", {"prompt": "Hi", "chosen": {"from": "narrator", "value": "x"}, "rejected": "y"}),
        ("TS107", {"prompt": "Hi", "chosen": {"from": "tool", "value": "x"}, "rejected": "y"}),
        ("TS106", {"prompt": "Hi", "chosen": " ", "rejected": "What?"}),
        ("TS106", {"prompt": "Hi", "chosen": "Hello", "rejected": ""}),
        ("TS107", {"chosen": [USER], "rejected": [USER, BAD]}),
        ("TS107", {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}),
        ("TS107", {"prompt": "Hi", "chosen": [], "rejected": []}),
        ("TS108", {"prompt": "Hi", "chosen": 3, "rejected": "x"}),
        ("TS108", {"prompt": 3, "chosen": "y", "rejected": "x"}),
        ("TS108", {"prompt": [USER], "chosen": {"role": "assistant", "content": None}, "rejected": "x"}),
        ("TS110", {"prompt": "Hi", "chosen": "Hello"}),
        ("TS110", {"prompt": "Hi", "chosen": None, "rejected": "Hello"}),
        ("TS111", {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}),
        ("TS112", {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]}),
        ("TS112", {"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ("TS112", {"conversations": [], "chosen": "Hello", "rejected": "What?"}),
        ("TS113", {"messages": [USER, GOOD]}),
    ],
)
def test_problems_are_coded_and_placed(code: str, row: dict[str, Any]) -> None:
    problem = to_pair(row, "f:7")
    assert isinstance(problem, Problem)
    assert problem.code == code, problem
    assert problem.where.startswith("f:7")


def test_a_preference_row_is_no_conversation_unless_it_is_said_which() -> None:
    row = {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    problem = to_messages(row, "f:1")
    assert isinstance(problem, Problem)
    assert problem.code == "TS113"
    assert to_messages(row, "f:1", "messages") == [USER, GOOD]


def kinds(path: Path) -> Counter[str]:
    found = [to_pair(row.value or {}, row.where) for row in read_rows(path)]
    return Counter(each.code if isinstance(each, Problem) else "pair" for each in found)


def test_real_files(shared_data: Path) -> None:
    assert kinds(shared_data / "alpaca_demo" / "dpo_en_demo.json") == {"pair": 300}
    # Five differ before the last answer, four have an empty answer.
    assert kinds(shared_data / "hh_rlhf" / "test.jsonl.gz") == {"pair": 2303, "TS112": 5, "TS106": 4}
