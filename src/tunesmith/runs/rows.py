"""Reads the rows that `prepare` wrote, for the later stages."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.runs.folder import Run


def prepared_rows(run: Run, name: str) -> Any:
    """`data/<name>.arrow` as a `datasets.Dataset`, memory-mapped. Raises DataError for rows of an earlier version."""
    from datasets import Dataset

    path = run.path / "data" / f"{name}.arrow"
    rows = Dataset.from_file(str(path))
    check_columns(rows.column_names, path)
    return rows


def check_columns(names: Collection[str], path: Path) -> None:
    """Raise DataError for the columns of an earlier version."""
    if "trained" in names:
        what = "the rows have a column 'trained', which is now called 'loss_mask'"
        why = "an earlier version prepared them, so the loss mask would not be found"
        raise DataError(Problem("TS113", what, str(path), why, "run `tunesmith prepare` again, into a new folder"))
