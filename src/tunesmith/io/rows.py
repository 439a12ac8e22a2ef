"""The only module that reads rows; it knows the location of each row (file, line, column).

Covered: `.jsonl` (one JSON object per line), `.json` (one array of objects, or an object with one array per split), `.csv`
(with a header) and `.conll`, plain or compressed as `.gz` or `.zst`; `.parquet`, `.arrow` and `.feather`; a folder or a hub
data set (`hub:owner/name`) with such files. All formats except `.json` stream: memory does not grow with the number of rows.
A `.json` file is read as a whole, because only its end shows whether it is valid.

The values of a row that is an array become the columns `0`, `1`, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.io import conll, tables
from tunesmith.io.compressed import lines_of, opened, plain_suffix, too_long
from tunesmith.io.folders import HUB, files_of, hub_files

LARGEST_JSON = 1 << 30  # bytes, decompressed


@dataclass(frozen=True)
class Row:
    """One row as read: its location `file:line`, and its value or the problem that kept it from being read."""

    where: str
    value: dict[str, Any] | None
    problem: Problem | None = None


def _malformed(where: str, detail: str) -> Problem:
    return Problem(
        "TS102",
        f"not valid JSON: {detail}",
        where,
        "a row that cannot be read cannot be trained on, and guessing would silently change your data",
        "correct that line; a .jsonl file holds one JSON object per line, a .json file one array, or one array per split",
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
    if isinstance(value, list):
        return Row(where, {str(number): each for number, each in enumerate(value)})
    return Row(where, None, _not_an_object(where, value))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with opened(path) as handle:
        for number, raw in enumerate(lines_of(handle), start=1):
            where = f"{path}:{number}"
            if raw is None:
                yield Row(where, None, _malformed(where, f"a line of {too_long()}"))
            elif row := _line(where, raw, "utf-8-sig" if number == 1 else "utf-8"):
                yield row


def _line(where: str, raw: bytes, encoding: str) -> Row | None:
    """The row of a line; None for a blank line."""
    try:
        line = raw.decode(encoding).strip()
        return _row(where, _DECODER.decode(line)) if line else None
    except json.JSONDecodeError as error:
        return Row(where, None, _malformed(f"{where}:{error.colno}", error.msg))
    except (ValueError, RecursionError) as error:
        return Row(where, None, _malformed(where, str(error) or "nested too deeply"))


class _JsonFile:
    """A `.json` file, read from start to end; it tracks the line of each row."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._line, self._counted = path, 0, 1, 0
        try:
            with opened(path) as handle:
                content = handle.read(LARGEST_JSON + 1)
            if len(content) > LARGEST_JSON:
                what = f"more than {LARGEST_JSON >> 30} GiB, and a .json file is read as a whole"
                why = "it would not fit in memory"
                raise DataError(Problem("TS102", what, str(path), why, "write one row per line, as .jsonl"))
            self._text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(_malformed(str(path), str(error))) from error

    def rows(self, split: str | None) -> Iterator[Row]:
        """The rows of the only array, or of the split's array. Raises DataError for a missing split or invalid JSON."""
        first = self._next()
        if first == "[" and split is not None:
            raise _no_split(self._path, split)
        if first == "[":
            yield from self._array()
        elif first == "{":
            yield from self._object(split or "train")
        elif first:
            raise self._broken("a .json file must hold one array of objects, or an object with one array per split")
        if self._next():
            raise self._broken("there is text after the end")

    def _array(self) -> Iterator[Row]:
        for _ in self._entries("]"):
            where = self._where()
            yield _row(where, self._value())

    def _object(self, wanted: str) -> Iterator[Row]:
        splits, found = [], False
        for _ in self._entries("}"):
            name = self._value()
            if not isinstance(name, str) or self._next() != ":":
                raise self._broken("expected a name and ':'")
            self._position += 1
            is_array = self._next() == "["
            splits += [name] * is_array
            if is_array and name == wanted and not found:
                found = True
                yield from self._array()
            else:
                self._value()
        if not found:
            raise _no_split(self._path, wanted, splits)

    def _entries(self, end: str) -> Iterator[None]:
        """Consumes the brackets and commas of an array or an object; the caller reads each entry."""
        self._position += 1
        if self._next() == end:
            self._position += 1
            return
        while True:
            yield
            mark = self._next()
            if mark not in (",", end):
                raise self._broken(f"expected ',' or {end!r} here" if mark else f"{end!r} is missing at the end")
            self._position += 1
            if mark == end:
                return
            self._next()

    def _value(self) -> Any:
        try:
            value, self._position = _DECODER.raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            raise DataError(_malformed(f"{self._path}:{error.lineno}:{error.colno}", error.msg)) from error
        except (ValueError, RecursionError) as error:
            raise self._broken(str(error) or "nested too deeply") from error
        return value

    def _next(self) -> str:
        """The next character that is not a blank; empty at the end."""
        while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
            self._position += 1
        return self._text[self._position : self._position + 1]

    def _where(self) -> str:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return f"{self._path}:{self._line}"

    def _broken(self, detail: str) -> DataError:
        return DataError(_malformed(self._where(), detail))


def _no_split(path: Path, split: str, splits: Sequence[str] = ()) -> DataError:
    fix = f"set `split` to one of: {', '.join(splits[:20])}" if splits else "remove `split`"
    return DataError(Problem("TS101", f"the file has no split {split!r}", str(path), "other rows would be read", fix))


def _tabled(read: Callable[[Path], Iterator[tables.Read]]) -> Callable[[Path], Iterator[Row]]:
    return lambda path: (Row(*made) for made in read(path))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _tabled(tables.csv_rows),
    **dict.fromkeys(conll.SUFFIXES, _tabled(conll.conll_rows)),
    ".parquet": _tabled(tables.parquet_rows),
    ".arrow": _tabled(tables.arrow_rows),
    ".feather": _tabled(tables.arrow_rows),
}
_TEXT = (".jsonl", ".json", ".csv", *conll.SUFFIXES)  # may be compressed; the other formats compress internally


_KINDS = (".json", *_READERS)


def is_rows(path: Path) -> bool:
    """Whether `read_rows` supports a file, judging by its name."""
    kind = plain_suffix(path)
    return kind in _KINDS and (kind == path.suffix or kind in _TEXT)


def _all_of(files: Iterable[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file)


def read_rows(path: Path | str, split: str | None = None) -> Iterator[Row]:
    """Rows of a file, a folder or a hub data set in order; an unreadable line yields a row with a problem.

    `split` names the part of a folder, a hub data set, or a `.json` file that is an object (`train` by default); other files
    have no splits. Raises DataError if the file is missing, of an unknown kind, damaged, or an invalid array (rows after the
    error could not be separated). An empty file yields nothing; reporting that is up to the caller.
    """
    if str(path).startswith(HUB):
        return _all_of(hub_files(str(path), split, is_rows))
    path = Path(path)
    if path.is_dir() and plain_suffix(path) not in _KINDS:
        return _all_of(files_of(path, split, is_rows))
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(
            Problem("TS101", f"data file {what}", str(path), "there is nothing to train on", "check the path in the recipe")
        )
    kind = plain_suffix(path)
    if not is_rows(path):
        raise DataError(
            Problem(
                "TS101",
                f"unknown kind of data file {path.suffix or '(no suffix)'!r}",
                str(path),
                "the reader is chosen by the file's suffix",
                f"give one of {', '.join(_KINDS)}; {', '.join(_TEXT)} also as .gz or .zst",
            )
        )
    if kind == ".json":
        return _JsonFile(path).rows(split)
    if split is not None:
        raise _no_split(path, split)
    return _READERS[kind](path)
