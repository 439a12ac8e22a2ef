"""The one module that reads rows, and knows where each row stands (file, line, column).

Covered: `.jsonl` (one JSON object a line), `.json` (one array of objects) and `.csv` (with a header), plain or compressed as
`.gz` or `.zst`; `.parquet`, `.arrow` and `.feather`; a folder with such files or `hub:owner/name`, by `datasets`. All but
`.json` stream: memory does not grow with the rows. A `.json` array is read whole, as its end decides whether it is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.io import tables
from tunesmith.io.compressed import opened, plain_suffix


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


def _read_jsonl(path: Path) -> Iterator[Row]:
    with opened(path) as handle:
        for number, raw in enumerate(handle, start=1):
            if row := _line(f"{path}:{number}", raw, "utf-8-sig" if number == 1 else "utf-8"):
                yield row


def _line(where: str, raw: bytes, encoding: str) -> Row | None:
    """The row in one line; None for a blank one."""
    try:
        line = raw.decode(encoding).strip()
        return _row(where, _DECODER.decode(line)) if line else None
    except json.JSONDecodeError as error:
        return Row(where, None, _malformed(f"{where}:{error.colno}", error.msg))
    except (ValueError, RecursionError) as error:
        return Row(where, None, _malformed(where, str(error) or "nested too deeply"))


def _read_json_array(path: Path) -> Iterator[Row]:
    try:
        with opened(path) as handle:
            text = handle.read().decode("utf-8-sig")
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


def _tabled(read: Callable[[Path], Iterator[tables.Read]]) -> Callable[[Path], Iterator[Row]]:
    return lambda path: (Row(*made) for made in read(path))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json_array,
    ".csv": _tabled(tables.csv_rows),
    ".parquet": _tabled(tables.parquet_rows),
    ".arrow": _tabled(tables.arrow_rows),
    ".feather": _tabled(tables.arrow_rows),
}
_TEXT = (".jsonl", ".json", ".csv")  # may be compressed; the others compress themselves


def read_rows(path: Path | str, split: str | None = None) -> Iterator[Row]:
    """Rows of a file, a folder or a hub data set in order; unreadable lines come as rows with a problem.

    `split` names the part of a folder or hub data set (`train` by default); a file has none. Raises DataError where the file is
    missing, of an unknown kind, damaged, or a broken array (nothing after the break could be told apart). An empty file
    yields nothing: the caller says so.
    """
    if str(path).startswith(tables.HUB):
        return (Row(*made) for made in tables.dataset_rows(str(path), split))
    path = Path(path)
    if path.is_dir() and not path.suffix:
        return (Row(*made) for made in tables.dataset_rows(str(path), split))
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(
            Problem("TS101", f"data file {what}", str(path), "there is nothing to train on", "check the path in the recipe")
        )
    if split is not None:
        why = "the whole file would be read"
        raise DataError(Problem("TS101", f"a file has no split {split!r}", str(path), why, "leave `split` out"))
    kind = plain_suffix(path)
    if kind not in _READERS or (kind != path.suffix and kind not in _TEXT):
        known = ", ".join(_READERS)
        raise DataError(
            Problem(
                "TS101",
                f"unknown kind of data file {path.suffix or '(no suffix)'!r}",
                str(path),
                "the reader is chosen by the file's suffix",
                f"give one of {known}; {', '.join(_TEXT)} also as .gz or .zst",
            )
        )
    return _READERS[kind](path)
