"""Rows of tables: csv, parquet, arrow and feather files.

All formats stream: at most one batch of rows is in memory, and its size is limited to that of a few rows of maximum size. A
csv row is located by its line, a row of the other formats as `file:row N`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.io.compressed import LONGEST_LINE, opened, too_long

_BATCH = 1000  # rows converted to Python values at a time
_HEAVY = 256 << 20  # bytes of a batch as Python values above which rows are converted one by one
_UNPACKED = 256 << 20  # bytes of a row group's column above which its compression ratio is checked
_RATIO = 1000  # maximum compression ratio: no text compresses that well

Read = tuple[str, Any, Problem | None]  # where, value, problem


def csv_rows(path: Path) -> Iterator[Read]:
    """Rows of a csv file with a header; a wrong number of cells or bad quoting is a problem of that line."""
    csv.field_size_limit(LONGEST_LINE)  # a longer cell means a quote that is never closed
    with opened(path) as handle:
        reader = csv.reader(_Lines(io.TextIOWrapper(handle, "utf-8-sig", "surrogateescape", newline="")), strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield where, None, _bad_line(where, str(error))
                continue
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = _header(cells, where)
                continue
            problem = _cells_problem(cells, header, where)
            yield where, None if problem else dict(zip(header, cells, strict=True)), problem


class _Lines(Iterator[str]):
    """A text's lines; a line that is too long is skipped and raises csv.Error, and the next call continues after it."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(LONGEST_LINE)
            raise csv.Error(f"a line of {too_long()}")
        return line


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) == len(cells):
        return cells
    why = "one of two columns with the same name would be lost"
    raise DataError(Problem("TS116", "a column name occurs twice in the header", where, why, "rename it"))


def _cells_problem(cells: list[str], header: list[str], where: str) -> Problem | None:
    if len(cells) != len(header):
        return _bad_line(where, f"{len(cells)} cells under {len(header)} column names")
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell if character >= "\ud800"):
        return _bad_line(where, "not UTF-8")
    return None


def _bad_line(where: str, detail: str) -> Problem:
    why = "a row that cannot be read cannot be trained on, and guessing would silently change your data"
    return Problem("TS116", f"not a row of the table: {detail}", where, why, "correct that line; quote cells with commas")


def parquet_rows(path: Path) -> Iterator[Read]:
    """Rows of a parquet file, one batch at a time; dictionary-encoded values are not expanded for every row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        for column in columns:
            if column.total_uncompressed_size > max(_UNPACKED, _RATIO * column.total_compressed_size):
                unpacked = f"{column.total_uncompressed_size / 2**30:.1f} GiB"
                raise pa.ArrowInvalid(f"column {column.path_in_schema[:60]!r} unpacks to {unpacked}")
        shared = {
            each.path_in_schema
            for each in columns
            if each.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in encoding for encoding in each.encodings)
        }
        yield from pq.ParquetFile(path, read_dictionary=sorted(shared)).iter_batches(batch_size=_BATCH)

    return _numbered(path, batches, pa.ArrowException)


def arrow_rows(path: Path) -> Iterator[Read]:
    """Rows of an Arrow stream (as `datasets` writes) or an Arrow file (feather), mapped into memory."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            whole = source.read(6) == b"ARROW1"
            source.seek(0)
            if not whole:
                yield from pa.ipc.open_stream(source)
                return
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

    return _numbered(path, batches, pa.ArrowException)


def _numbered(path: Path, batches: Callable[[], Iterable[Any]], damage: type[Exception]) -> Iterator[Read]:
    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _BATCH):
                for value in _values(batch.slice(start, _BATCH)):
                    number += 1
                    where = f"{path}:row {number}"
                    yield where, value, None if value is not None else _bad_line(where, f"a row of {too_long()}")
    except (damage, OSError) as error:
        detail = str(error).strip().split("\n", maxsplit=1)[0][:200]
        why = "the rows after the damage are lost"
        raise DataError(Problem("TS114", f"not a complete table: {detail}", str(path), why, "download it again")) from error


def _values(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch as Python values; None for a row that is too large."""
    if sum(map(_bytes, batch.columns)) <= _HEAVY:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        yield None if sum(map(_bytes, row.columns)) > LONGEST_LINE else row.to_pylist()[0]


def _bytes(array: Any) -> int:
    """Bytes of an array once every element has its own copy of values that Arrow stores once and shares."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types, kind = pa.types, array.type
    if types.is_dictionary(kind) and (types.is_string(kind.value_type) or types.is_large_string(kind.value_type)):
        size = pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    elif types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        size = (array.dictionary if types.is_dictionary(kind) else array.values).nbytes * len(array)
    elif types.is_struct(kind):
        size = sum(map(_bytes, array.flatten()))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        size = _bytes(array.flatten())
    elif types.is_map(kind):
        begun, ended = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
        size = sum(_bytes(part.slice(begun, ended - begun)) for part in (array.keys, array.items))
    else:
        size = array.nbytes
    return int(size)
