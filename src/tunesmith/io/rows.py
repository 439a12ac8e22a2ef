"""The one module that reads rows, and knows where each row stands (file, line, column).

Covered: `.jsonl` (one JSON object a line), the same compressed as `.jsonl.gz`, and `.json` (one array of objects). Not covered
yet: csv, parquet, arrow, other compressed files and hub ids.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem


@dataclass(frozen=True)
class Row:
    """One row as read: its place `file:line`, its value, or the problem that kept it from being read."""

    where: str
    value: dict[str, Any] | None
    problem: Problem | None = None


def _malformed(where: str, detail: str) -> Problem:
    return Problem(
        "TS102",
        f"not valid JSON: {detail}",
        where,
        "a row that cannot be read cannot be trained on, and guessing would change your data quietly",
        "correct that line; a .jsonl file holds exactly one JSON object on each line, a .json file one array",
    )


def _not_an_object(where: str, value: Any) -> Problem:
    return Problem(
        "TS102",
        f"a row must be a JSON object, found {type(value).__name__}",
        where,
        "columns are looked up by name",
        'write each row as {"messages": [...]} or {"instruction": ..., "output": ...}',
    )


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def _row(where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, None, _not_an_object(where, value))


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines, decompressed on the way. Raises DataError where a compressed file is damaged."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
        try:
            yield from handle
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            why = "the rows after the damage are lost"
            fix = "get the file again, or compress it again with gzip"
            raise DataError(Problem("TS114", f"not a whole gzip file: {error}", str(path), why, fix)) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not line:
                continue
            yield _row(where, _DECODER.decode(line))
        except json.JSONDecodeError as error:
            yield Row(where, None, _malformed(f"{where}:{error.colno}", error.msg))
        except (ValueError, RecursionError) as error:
            yield Row(where, None, _malformed(where, str(error) or "nested too deeply"))


def _read_json_array(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_malformed(str(path), str(error))) from error
    position, line = _skip_blank(text, 0), 1
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(_malformed(f"{path}:1", "a .json file must hold one array of objects"))
    counted = 0
    position = _skip_blank(text, position + 1)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path}:{line}"
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(_malformed(f"{path}:{error.lineno}:{error.colno}", error.msg)) from error
        except (ValueError, RecursionError) as error:
            raise DataError(_malformed(where, str(error) or "nested too deeply")) from error
        yield _row(where, value)
        position = _skip_blank(text, end)
        if position < len(text) and text[position] == ",":
            position = _skip_blank(text, position + 1)
        elif position >= len(text) or text[position] != "]":
            raise DataError(_malformed(where, "expected ',' or ']' after this row"))
    if position >= len(text) or _skip_blank(text, position + 1) != len(text):
        raise DataError(_malformed(f"{path}:{text.count(chr(10)) + 1}", "the array is not closed, or text follows it"))


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl`, `.jsonl.gz` or `.json` file in order; unreadable JSONL lines come as rows with a problem.

    Raises DataError where the file is missing, of an unknown kind, damaged, or a broken array (nothing after the break
    could be told apart). An empty file yields nothing: the caller says so.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(
            Problem("TS101", f"data file {what}", str(path), "there is nothing to train on", "check the path in the recipe")
        )
    if path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json_array(path)
    raise DataError(
        Problem(
            "TS101",
            f"unknown kind of data file {path.suffix or '(no suffix)'!r}",
            str(path),
            "the reader is chosen by the file's suffix",
            "give a .jsonl, .jsonl.gz or .json file",
        )
    )
