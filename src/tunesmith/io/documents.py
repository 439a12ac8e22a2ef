"""Raw-text documents: plain files, folders of plain files, and rows with a `text` column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import sha256_file, sha256_json
from tunesmith.io.rows import Row, read_rows

#: Suffixes of files that hold one document each.
PLAIN = (".txt", ".md")


def read_documents(path: Path | str, split: str | None = None) -> Iterator[Row]:
    """Rows with a `text`: the rows that `read_rows` reads, or one row per .txt or .md file.

    A folder yields its .txt and .md files, including those in subfolders, sorted by path. With a `split` it is read as a data
    set, as in `read_rows`. A file that is not UTF-8 yields a row with a problem. Raises DataError as `read_rows` does, and for
    a folder without such files.
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
    """The reader for documents or for rows; it takes a path and a split and yields rows."""
    return read_documents if documents else read_rows


def plain_files(folder: Path) -> list[Path]:
    """All .txt and .md files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in PLAIN)


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's documents."""
    return sha256_json({path.relative_to(folder).as_posix(): sha256_file(path) for path in plain_files(folder)})


def _document(path: Path) -> Row:
    try:
        return Row(str(path), {"text": path.read_bytes().decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        why = "text in another encoding would be trained on as garbled text"
        return Row(str(path), None, Problem("TS108", f"not UTF-8: {error}", str(path), why, "convert the file to UTF-8"))
