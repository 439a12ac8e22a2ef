"""The row reader: each row with its line, each fault with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.io.rows import read_rows


def test_jsonl_rows_carry_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert [(r.where, r.value) for r in read_rows(path)] == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]


def test_compressed_rows_are_read_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": }\n'))
    rows = list(read_rows(path))
    assert [(row.where, row.value) for row in rows] == [(f"{path}:1", {"a": 1}), (f"{path}:3", None)]
    assert rows[1].problem is not None
    assert rows[1].problem.where == f"{path}:3:7"


@pytest.mark.parametrize("damage", ["cut", "plain"])
def test_damaged_compression_is_readable(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(1000)))
    path.write_bytes(whole[:-20] if damage == "cut" else b'{"a": 1}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert (caught.value.problems[0].code, caught.value.problems[0].where) == ("TS114", str(path))


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"a": }', ":2:7"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "utf-8"),
        (b'{"a": NaN}', "NaN"),
        (b"[" * 9999, ""),
    ],
)
def test_bad_jsonl_line_is_a_row_with_a_problem(tmp_path: Path, line: bytes, detail: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows = list(read_rows(path))
    assert [row.problem is None for row in rows] == [True, False, True]
    problem = rows[1].problem
    assert problem is not None
    assert problem.code == "TS102"
    assert f"{path}:2" in problem.where
    assert detail in problem.where + problem.what


def test_json_array_rows_carry_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n 2}, 3\n]\n', encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert rows[2].problem is not None


@pytest.mark.parametrize(
    ("text", "where"),
    [('[{"a": 1},\n{"a": }]', ":2:7"), ('{"a": 1}', ":1"), ('[{"a": 1} {"b": 2}]', ":1"), ('[{"a": 1}', ":1"), ("[] x", ":1")],
)
def test_broken_array_raises_with_its_place(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.problems[0].where.endswith(where)


@pytest.mark.parametrize("name", ["missing.jsonl", "a.txt", "folder.jsonl", "a.json.gz"])
def test_no_such_file_or_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("{}", encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[]"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert caught.value.problems[0].code == "TS101"


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=5), st.booleans())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], array: bool) -> None:
    path = tmp_path_factory.mktemp("rows") / ("a.json" if array else "a.jsonl")
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    assert [row.value for row in read_rows(path)] == rows
