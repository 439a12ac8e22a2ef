"""Documents of raw text: plain files, folders of them, and rows with a `text` column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import sha256_file, sha256_json
from tunesmith.io.rows import Row, read_rows

#: Suffixes of files that are one document each.
PLAIN = (".txt", ".md")


def read_documents(path: Path | str, split: str | None = None) -> Iterator[Row]:
    """Rows with a `text`: those that `read_rows` reads, or one for each .txt or .md file.

    A folder gives its .txt and .md files, also those in folders below it, sorted by path; with a `split` it is a data set, as
    `read_rows` has it. A file that is not UTF-8 comes as a row with a problem. Raises DataError as `read_rows` does, and for a
    folder without such files.
    """
    file = Path(path)
    if split is None and file.is_dir():
        files = plain_files(file)
        if not files:
            what, why = "no .txt or .md file in this folder", "there is nothing to train on"
            raise DataError(Problem("TS101", what, str(path), why, "check the path, or give a .jsonl file of texts"))
        return map(_document, files)
    if split is None and file.is_file() and file.suffix in PLAIN:
        return iter([_document(file)])
    return read_rows(path, split)


def reader_of(*, documents: bool) -> Callable[[Path | str, str | None], Iterator[Row]]:
    """What reads rows, or documents: path and split to rows."""
    return read_documents if documents else read_rows


def plain_files(folder: Path) -> list[Path]:
    """The .txt and .md files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in PLAIN)


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's documents."""
    return sha256_json({path.relative_to(folder).as_posix(): sha256_file(path) for path in plain_files(folder)})


def _document(path: Path) -> Row:
    try:
        return Row(str(path), {"text": path.read_bytes().decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        why = "bytes that are no text would be trained on as something else"
        return Row(str(path), None, Problem("TS108", f"not UTF-8: {error}", str(path), why, "convert the file to UTF-8"))
