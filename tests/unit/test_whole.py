"""State kept per row: keys and locations, small and exact."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.stages.prepare.whole import _Keys, _Names, _Places


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=300))
def test_a_key_stands_under_its_first_number(keys: list[int]) -> None:
    table, first = _Keys(), dict[int, int]()
    for number, key in enumerate(keys):
        expected = first.get(key)
        assert table.put(key, number) == expected
        first.setdefault(key, number)


def test_keys_survive_growth() -> None:
    table = _Keys()
    keys = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(20_000)]
    assert [table.put(key, number) for number, key in enumerate(keys)] == [None] * len(keys)
    assert [table.put(key, 0) for key in keys] == list(range(len(keys)))


def test_places_are_kept_without_their_source() -> None:
    shown = [("a.jsonl:1", 0), ("b/c.csv:row 2", 1), ("elsewhere:3", 1), ("a.jsonl:4\udcff", 0)]
    places = _Places(["a.jsonl", "b/c.csv"])
    for where, source in shown:
        places.append(where, source)
    assert [places[number] for number in range(len(shown))] == [where for where, _ in shown]


def test_names_are_kept_once() -> None:
    shown = ["en", None, "zh", "en", "", None]
    names = _Names()
    for name in shown:
        names.append(name)
    assert [names[row] for row in range(len(shown))] == shown


def test_a_process_that_reads_rows_does_without_torch() -> None:
    """Nothing between a row and its ids imports torch; tests/e2e/test_prepare.py compares the results."""
    code = """
import sys
from tunesmith.stages.prepare import pool
from tunesmith.stages.prepare.work import Settings
from tunesmith.chat.named import named_template
from tunesmith.recipe import DataSection
from tunesmith.io.rows import Row
from tunesmith.models.load import locate
from tunesmith.runs.decisions import Decisions
folder = locate("smollm2-135m-instruct")
pool._start(Settings(DataSection(train="x"), "conversation", folder, named_template("chatml"), frozenset(), Decisions()))
made = pool._work([(0, Row("f:1", {"prompt": "What is asked here?", "completion": "What is answered here, in short."}))])
assert len(made.made) == 1, made
print(sys.modules["torch"])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "None"
