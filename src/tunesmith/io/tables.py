"""Rows of tables: csv, parquet, arrow and feather files, and data sets of the hub or of a folder.

All stream: no more than a batch of rows is in memory. A csv row stands at its line, a row of the others at `file:row N`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.io.compressed import opened

_BATCH = 1000  # rows turned into Python values at a time
_CELL = 1 << 28  # characters of a csv cell: more is a quote that is never closed

Read = tuple[str, Any, Problem | None]  # where, value, problem


def csv_rows(path: Path) -> Iterator[Read]:
    """Rows of a csv file with a header; a row of another width, or bad quotes, is a problem of its line."""
    csv.field_size_limit(_CELL)
    with opened(path) as handle:
        reader = csv.reader(io.TextIOWrapper(handle, "utf-8-sig", "surrogateescape", newline=""), strict=True)
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


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) == len(cells):
        return cells
    why = "of two columns with one name one would be lost"
    raise DataError(Problem("TS116", "a column name stands twice in the header", where, why, "rename it"))


def _cells_problem(cells: list[str], header: list[str], where: str) -> Problem | None:
    if len(cells) != len(header):
        return _bad_line(where, f"{len(cells)} cells under {len(header)} column names")
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell if character >= "\ud800"):
        return _bad_line(where, "not UTF-8")
    return None


def _bad_line(where: str, detail: str) -> Problem:
    why = "a row that cannot be read cannot be trained on, and guessing would change your data quietly"
    return Problem("TS116", f"not a row of the table: {detail}", where, why, "correct that line; quote cells that hold commas")


def parquet_rows(path: Path) -> Iterator[Read]:
    """Rows of a parquet file, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return _numbered(path, lambda: pq.ParquetFile(path).iter_batches(batch_size=_BATCH), pa.ArrowException)


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
                for value in batch.slice(start, _BATCH).to_pylist():
                    number += 1
                    yield f"{path}:row {number}", value, None
    except (damage, OSError) as error:
        detail = str(error).strip().split("\n", maxsplit=1)[0][:200]
        why = "the rows after the damage are lost"
        raise DataError(Problem("TS114", f"not a whole table: {detail}", str(path), why, "get the file again")) from error


HUB = "hub:"  # hub:owner/name or hub:owner/name@revision


def hub_name(path: str) -> tuple[str, str | None]:
    """Name and revision of `hub:owner/name@revision`."""
    name, _, revision = path.removeprefix(HUB).partition("@")
    return name, revision or None


def hub_commit(path: str) -> str:
    """The commit that `hub:owner/name@revision` stands for; asks the hub unless the revision is a commit. Raises DataError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, revision = hub_name(path)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        why, fix = "there is nothing to train on", "check the name and the network, or name a commit after @"
        raise DataError(Problem("TS101", f"cannot reach the data set: {detail}", path, why, fix)) from error


def dataset_rows(path: str, split: str | None) -> Iterator[Read]:
    """Rows of a hub data set, or of a folder with data files, streamed by `datasets`. Raises DataError without it."""
    from datasets import load_dataset

    name, revision = hub_name(path) if path.startswith(HUB) else (path, None)
    wanted = split or "train"
    try:
        rows = load_dataset(name, split=wanted, revision=revision, streaming=True)
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        why, fix = "there is nothing to train on", "check the name, the split and the network"
        raise DataError(Problem("TS101", f"cannot open the data set, split {wanted!r}: {detail}", path, why, fix)) from error
    return _streamed(rows, path, wanted)


def _streamed(rows: Iterable[dict[str, Any]], path: str, split: str) -> Iterator[Read]:
    for number, value in enumerate(rows, start=1):
        yield f"{path}:{split} row {number}", dict(value), None
