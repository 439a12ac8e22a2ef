"""Plain or compressed (`.gz`, `.zst`) files opened for reading bytes; damage is an error that names the file.

A small compressed file can hold a line too large for memory. `lines_of` therefore reads lines with a size limit.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from tunesmith.errors import DataError, Problem

#: Maximum bytes of a line or a row. No context window is that long.
LONGEST_LINE = 64 << 20

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def plain_suffix(path: Path) -> str:
    """The suffix that gives the file format: `.jsonl` for `a.jsonl.zst`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed while reading. Raises DataError if the data read is damaged."""
    try:
        with _open(path) as handle:
            yield handle
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, "gzip", error) from error
    except OSError as error:
        if path.suffix != ".zst":
            raise
        raise _damaged(path, "zstd", error) from error


def lines_of(handle: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for each line that is too long, which is skipped and never held in memory as a whole."""
    while raw := handle.readline(LONGEST_LINE + 1):
        if len(raw) <= LONGEST_LINE:
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = handle.readline(LONGEST_LINE)
        yield None


def too_long() -> str:
    """How messages describe a line or a row for which `lines_of` yields None."""
    return f"more than {LONGEST_LINE >> 20} MiB in one"


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return cast("BinaryIO", io.BufferedReader(stream, 1 << 20))
    return path.open("rb")


def _damaged(path: Path, name: str, error: Exception) -> DataError:
    fix = f"download the file again, or compress it again with {name}"
    return DataError(
        Problem("TS114", f"not a complete {name} file: {error}", str(path), "the rows after the damage are lost", fix)
    )
