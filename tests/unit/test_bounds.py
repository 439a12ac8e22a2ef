"""Small files that unpack to gigabytes: read within bounds, with a readable message about what was too large."""

from __future__ import annotations

import gzip
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1 << 20


def packed(path: Path, parts: list[tuple[bytes, int]]) -> None:
    """A gzip file of repeated parts, as (content, count), which is never fully in memory."""
    with gzip.open(path, "wb", compresslevel=1) as handle:
        for part, times in parts:
            for _ in range(times):
                handle.write(part)


def parquet(path: Path, column: pa.Array) -> None:
    table = pa.table({"text": column})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)


def shared(size: int, rows: int) -> pa.Array:
    """One text for all rows, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * size]))


def dictionary_page(path: Path) -> None:
    parquet(path, shared(600 * MIB, 10))


def in_lists(path: Path) -> None:
    parquet(path, pa.ListArray.from_arrays(pa.array([0, 100_000], pa.int32()), shared(MIB, 100_000)))


def run_ends(path: Path) -> None:
    table = pa.table({"text": pa.RunEndEncodedArray.from_arrays(pa.array([100_000], pa.int32()), pa.array(["a" * 8 * MIB]))})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


LINE, LINES = (b"x" * MIB, 700), (b"x" * 1023 + b"\n") * 1024

#: How to write the file, how many of the first 1,000 rows can be read, and the error for the others or for the file.
BOMBS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "line.csv.gz": (lambda p: packed(p, [(b"q,a\n1,2\n", 1), LINE, (b"\n3,4\n", 1)]), 2, "more than 64 MiB in one"),
    "cell.csv.gz": (lambda p: packed(p, [(b'q,a\n1,2\n"', 1), (LINES, 700), (b'",4\n', 1)]), 1, "field larger"),
    "line.conll.gz": (lambda p: packed(p, [(b"a\tO\n\n", 1), LINE, (b"\tO\n\nb\tO\n", 1)]), 2, "more than 64 MiB in one"),
    "sentence.conll.gz": (lambda p: packed(p, [(b"a\tO\n\n", 1), (b"word\tO\n" * 1000, 3000)]), 1, "more than 1,000,000 words"),
    "line.jsonl.gz": (lambda p: packed(p, [(b'{"a": 1}\n', 1), LINE, (b'\n{"a": 2}\n', 1)]), 2, "more than 64 MiB"),
    "rows.parquet": (lambda p: parquet(p, shared(8 * MIB, 100_000)), 1000, ""),
    "row.parquet": (lambda p: parquet(p, shared(80 * MIB, 100_000)), 0, "more than 64 MiB in one"),
    "lists.parquet": (in_lists, 0, "more than 64 MiB in one"),
    "page.parquet": (dictionary_page, 0, "unpacks to"),
    "runs.arrow": (run_ends, 1000, ""),
}

READ = """
import itertools, resource, sys
from tunesmith.io.rows import read_rows
from tunesmith.errors import TunesmithError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
good, told = 0, set()
try:
    for row in itertools.islice(read_rows(sys.argv[1]), 1000):
        good += row.value is not None
        if row.problem: told.add(row.problem.what)
except TunesmithError as error:
    told.add(str(error))
print(good, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, told)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_within_bounds(name: str, tmp_path: Path) -> None:
    make, rows, told = BOMBS[name]
    make(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 10 * MIB
    limit = 6 << 30  # unbounded, it would take tens of GiB

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=bounded,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    good, mebibytes, said = done.stdout.split(maxsplit=2)
    assert int(good) == rows, said
    assert told in said
    assert int(mebibytes) < 900
