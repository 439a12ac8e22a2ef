"""Rows to prepare, and what was prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.conftest import COLOURS, chat_row

WORDS = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "grove", "harbour", "iris", "juniper", "kelp", "lagoon")


def question(number: int) -> str:
    return f"Tell me of {' '.join(WORDS[(number * step + number // 12) % 12] for step in (1, 5, 7, 11))} {number}?"


def rows_of(count: int, begin: int = 0) -> list[dict[str, Any]]:
    return [chat_row(question(i), f"{COLOURS[i % 8]} {WORDS[i * 5 % 12]} {i}") for i in range(begin, begin + count)]


def read_arrow(path: Path) -> list[dict[str, Any]]:
    with pa.memory_map(str(path)) as source:
        found: list[dict[str, Any]] = pa.ipc.open_stream(source).read_all().to_pylist()
    return found


def balanced(ledger: dict[str, Any]) -> bool:
    out: int = ledger["rows_train"] + ledger["rows_heldout"] + ledger["rows_unused"] + ledger["rows_rejected"]
    return ledger["rows_in"] + ledger["rows_added"] == out
