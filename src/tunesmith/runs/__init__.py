"""The run folder, shared by all stages (`folder`), and human decisions about rows (`decisions`)."""

from tunesmith.runs.folder import (
    EVAL_SUITE,
    Run,
    create_run,
    default_name,
    eval_folder,
    installed_versions,
    open_run,
    read_jsonl,
)
from tunesmith.runs.rows import check_columns, prepared_rows

__all__ = [
    "EVAL_SUITE",
    "Run",
    "check_columns",
    "create_run",
    "default_name",
    "eval_folder",
    "installed_versions",
    "open_run",
    "prepared_rows",
    "read_jsonl",
]
