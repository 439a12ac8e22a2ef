"""Files that may be compressed (`.gz`, `.zst`), opened for reading bytes; damage is an error that names the file."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from tunesmith.errors import DataError, Problem

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
