"""Files that may be compressed (`.gz`, `.zst`), opened for reading bytes; damage is an error that names the file.

A small one can hold a line that fits in no memory, so lines are read by `lines_of`, which never holds more than so much.
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

#: Bytes of a line, or of a row. No context is as long.
LONGEST_LINE = 64 << 20

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def plain_suffix(path: Path) -> str:
    """The suffix that tells the kind of rows: `.jsonl` of `a.jsonl.zst`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed on the way. Raises DataError where what is read turns out to be damaged."""
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
    """The lines of a file, None for each that is too long: it is passed over, and never in memory whole."""
    while raw := handle.readline(LONGEST_LINE + 1):
        if len(raw) <= LONGEST_LINE:
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = handle.readline(LONGEST_LINE)
        yield None


def too_long() -> str:
    """What is said of a line or a row for which `lines_of` gives None."""
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
    fix = f"get the file again, or compress it again with {name}"
    return DataError(
        Problem("TS114", f"not a whole {name} file: {error}", str(path), "the rows after the damage are lost", fix)
    )
