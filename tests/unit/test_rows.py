"""The row reader: each row with its line number, each error with its location."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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
        (b"7", "must be a JSON object"),
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
    [
        ('[{"a": 1},\n{"a": }]', ":2:7"),
        ('"a"', ":1"),
        ('{"train": []', ":1"),
        ("{1: []}", ":1"),
        ('{"train"}', ":1"),
        ('[{"a": 1} {"b": 2}]', ":1"),
        ('[{"a": 1}', ":1"),
        ("[] x", ":1"),
    ],
)
def test_broken_array_raises_with_its_place(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.problems[0].where.endswith(where)


@pytest.mark.parametrize("name", ["missing.jsonl", "a.txt", "folder.jsonl", "a.parquet.gz"])
def test_no_such_file_or_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("{}", encoding="utf-8")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"[]"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert caught.value.problems[0].code == "TS101"


VALUES = [{"prompt": f"question {number}", "completion": "a,\nb"} for number in range(2500)]


def _write(path: Path, values: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    table = pa.Table.from_pylist(values)
    match path.name.partition(".")[2]:
        case "jsonl.zst":
            with pa.CompressedOutputStream(str(path), "zstd") as sink:
                sink.write(lines)
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(values).encode()))
        case "csv" | "csv.gz" as kind:
            text = "prompt,completion\n" + "".join(f'{v["prompt"]},"{v["completion"]}"\n' for v in values)
            path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
        case "parquet":
            pq.write_table(table, path)
        case "arrow":
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table, 700)
        case "feather":
            with pa.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table, 700)


@pytest.mark.parametrize(
    ("name", "second"),
    [("a.jsonl.zst", ":2"), ("a.json.gz", ":1"), ("a.csv", ":4"), ("a.csv.gz", ":4")]
    + [(f"a.{kind}", ":row 2") for kind in ("parquet", "arrow", "feather")],
)
def test_every_kind_says_the_same_and_where(tmp_path: Path, name: str, second: str) -> None:
    path = tmp_path / name
    _write(path, VALUES)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == VALUES
    assert rows[1].where == f"{path}{second}"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.arrow", "a.feather"])
def test_damaged_tables_are_readable(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write(path, VALUES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert (caught.value.problems[0].code, caught.value.problems[0].where) == ("TS114", str(path))


def test_bad_csv_lines_are_rows_with_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n3\n"x"y,1\n\xff,4\n5,6\n')
    rows = list(read_rows(path))
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3", "4", "5", "6"]
    assert [row.problem.code if row.problem else "" for row in rows] == ["", "TS116", "TS116", "TS116", ""]
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError):
        list(read_rows(path))


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=5), st.booleans())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], array: bool) -> None:
    path = tmp_path_factory.mktemp("rows") / ("a.json" if array else "a.jsonl")
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    assert [row.value for row in read_rows(path)] == rows


def test_rows_that_are_arrays_have_their_places_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('["Hi", "greeting"]\n[]\n', encoding="utf-8")
    assert [row.value for row in read_rows(path)] == [{"0": "Hi", "1": "greeting"}, {}]


def test_a_json_object_has_an_array_for_each_split(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"note": {"by": 1},\n "val": [{"a": 1}],\n "train": [\n["x"],\n {"a": 2}]\n}\n', encoding="utf-8")
    assert [(row.where, row.value) for row in read_rows(path)] == [(f"{path}:4", {"0": "x"}), (f"{path}:5", {"a": 2})]
    assert [(row.where, row.value) for row in read_rows(path, "val")] == [(f"{path}:2", {"a": 1})]
    with pytest.raises(DataError) as caught:
        list(read_rows(path, "test"))
    assert caught.value.problems[0].fix == "set `split` to one of: val, train"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="no split 'test'"):
        list(read_rows(path, "test"))


def test_sentences_with_tags(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    words = ["New NNP I-place", "York NNP I-place", "is O", "Ada B-person", "Bo B-person"]
    lines = ["-DOCSTART- -X- O", "", "# a comment", *words, "# O"]
    path.write_text("\n".join([*lines, "", "word", "", "so\tO"]), encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [f"{path}:4", f"{path}:11", f"{path}:13"]
    assert rows[0].value is not None
    assert rows[0].value["text"] == "New York is Ada Bo #"
    assert rows[0].value["entities"] == [
        {"type": "place", "text": "New York"},
        {"type": "person", "text": "Ada"},
        {"type": "person", "text": "Bo"},
    ]
    assert rows[1].problem is not None
    assert (rows[1].problem.code, rows[1].problem.where) == ("TS116", f"{path}:11")
    assert rows[2].value is not None
    assert rows[2].value["entities"] == []


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_problems_of_conll(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("conll") / "a.conll"
    path.write_bytes(content)
    for row in read_rows(path):
        assert (row.value is None) != (row.problem is None)
        if row.value is not None:
            assert len(row.value["tokens"]) == len(row.value["tags"]) > 0
