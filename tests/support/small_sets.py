"""Small sets of rows of our own, in the files and formats of the public sets that recipes/ names."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.prepared import WORDS, question

EACH = 20  # rows of a file
FOLDS = 20

#: Rows for training and, if the recipe has a test file, for testing; by recipe.
ROWS = {
    "alpaca": (4 * EACH, None),
    "clinc150": (2 * EACH, EACH),
    "dpo": (EACH, None),
    "gsm8k": (EACH, EACH),
    "hh_rlhf": (EACH, None),
    "kto": (EACH, None),
    "nlupp": (19 * EACH // 4, EACH // 4),
    "pretrain": (EACH, None),
    "wnut17": (EACH, EACH),
}


def _answer(number: int) -> str:
    return f"It is {WORDS[number * 5 % 12]} and {WORDS[number * 7 % 12]}, found {number} times."


def _sum(number: int) -> str:
    return f"{question(number)} How many stones are that in all, if each of the {number} heaps has three, and one heap is lost?"


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _jsonl(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def _turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def _tool_call(number: int) -> dict[str, Any]:
    call = {"name": "count_stones", "arguments": {"colour": WORDS[number % 12]}}
    result, tool = {"stones": number}, {"name": "count_stones", "description": "Count the stones of a colour", "parameters": {}}
    turns = [_turn("human", question(number)), _turn("function_call", json.dumps(call))]
    turns += [_turn("observation", json.dumps(result)), _turn("gpt", _answer(number))]
    return {"conversations": turns, "tools": json.dumps([tool])}


def _request(number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"text": question(number)}
    if number % 3:
        row["intents"] = ["ask", WORDS[number % 12]]
    if number % 2:
        row["slots"] = {"stone": {"text": WORDS[number % 12], "span": [0, 4]}}
    return row


def _entities(path: Path, first: int) -> None:
    lines = []
    for number in range(first, first + EACH):
        lines += [f"{word}\tO" for word in question(number).split()]
        lines += ["near\tO", "North\tB-location", f"{WORDS[number % 12].title()}\tI-location", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_small_sets(folder: Path) -> None:
    """Write all of them into `folder`, where recipes/ expects `data`."""
    train, test = range(EACH), range(100, 100 + EACH)
    demo = folder / "alpaca_demo"
    for name, first in (("alpaca_en_demo", 0), ("alpaca_zh_demo", 20), ("identity", 40)):
        rows = [{"instruction": question(i), "input": "", "output": _answer(i)} for i in range(first, first + EACH)]
        _json(demo / f"{name}.json", rows)
    _json(demo / "glaive_toolcall_en_demo.json", [_tool_call(number) for number in range(60, 60 + EACH)])
    _json(
        demo / "dpo_en_demo.json",
        [
            {
                "conversations": [_turn("human", question(i))],
                "chosen": _turn("gpt", _answer(i)),
                "rejected": _turn("gpt", "No."),
            }
            for i in train
        ],
    )
    judged = [
        {
            "messages": [{"content": question(i), "role": "user"}, {"content": _answer(i), "role": "assistant"}],
            "label": bool(i % 2),
        }
        for i in train
    ]
    _json(demo / "kto_en_demo.json", judged)
    _jsonl(demo / "c4_demo.jsonl", [{"text": f"{question(i)} {_answer(i)} {question(i + 50)}"} for i in train])
    intents = {"train": train, "oos_train": range(50, 50 + EACH), "test": test}
    for name in ("data_imbalanced", "data_full"):
        split = {
            key: [[question(i), WORDS[i % 5] if key != "oos_train" else "oos"] for i in rows] for key, rows in intents.items()
        }
        _json(folder / "clinc150" / f"{name}.json", split)
    for name, numbers in (("train", train), ("test", test)):
        _jsonl(
            folder / "gsm8k" / f"{name}.jsonl",
            [{"question": _sum(i), "answer": f"{_answer(i)}\n#### {i}"} for i in numbers],
        )
    pairs = [
        {side: f"\n\nHuman: {question(i)}\n\nAssistant: {text}" for side, text in (("chosen", _answer(i)), ("rejected", "No."))}
        for i in train
    ]
    _jsonl(folder / "hh_rlhf" / "test.jsonl.gz", pairs)
    for fold in range(FOLDS):
        numbers = range(fold * EACH // 4, (fold + 1) * EACH // 4)
        _json(folder / "nlupp" / "banking" / f"fold{fold}.json", [_request(number) for number in numbers])
    _entities(folder / "wnut17" / "wnut17train.conll", 0)
    _entities(folder / "wnut17" / "emerging.test.annotated", 100)
    _mmlu(folder / "mmlu")
    _jsonl(
        folder / "humaneval" / "HumanEval.jsonl.gz",
        [
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f'def stones_{i}(count):\n    """{question(i)}"""\n',
                "canonical_solution": f"    return count + {i}\n",
            }
            for i in train
        ],
    )


def _mmlu(folder: Path) -> None:
    header = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
    for part, count in (("dev", 5), ("test", EACH)):
        for subject in ("anatomy", "abstract_algebra"):
            path = folder / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(header)
                first = {"dev": 200, "test": 0}[part] + (300 if subject == "anatomy" else 0)
                rows.writerows((question(i), *WORDS[i % 8 : i % 8 + 4], i % 4) for i in range(first, first + count))
