"""Maps a row's columns to the names that its format expects: by renaming, or with a template over the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, UndefinedError

from tunesmith.chat.formats import wrong_columns
from tunesmith.errors import DataError, Problem
from tunesmith.io.signals import TEMPLATE_SECONDS, TooLongError, cpu_limit
from tunesmith.io.templates import BoundedEnvironment
from tunesmith.recipe import is_template


def mapped(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any] | Problem:
    """The row with the columns that `data.columns` names, under the format's names; a Problem if the row lacks one.

    A value with `{{` or `{%` is a Jinja template that returns text. It sees the row's columns by name and the whole row as
    `row`. Renamed columns are removed; columns that templates read are kept.

    Raises DataError for a template that does not terminate.
    """
    made: dict[str, Any] = {}
    taken = set()
    for ours, theirs in columns.items():
        if is_template(theirs):
            text = _written(theirs, row, where)
            if isinstance(text, Problem):
                return text
            made[ours] = text
        elif theirs in row:
            taken.add(theirs)
            made[ours] = row[theirs]
        else:
            return wrong_columns(row, where, f"with {theirs!r}, which data.columns names")
    return {name: value for name, value in row.items() if name not in taken} | made


def _written(source: str, row: Mapping[str, Any], where: str) -> str | Problem:
    try:
        with cpu_limit(TEMPLATE_SECONDS):
            return _compiled(source).render({**row, "row": row})
    except TooLongError as error:
        what = f"a template in data.columns does not terminate: {error}"
        problem = Problem("TS124", what, where, "no row could be processed", "write a template that terminates")
        raise DataError(problem) from error
    except UndefinedError as error:
        return wrong_columns(row, where, f"with the columns that data.columns reads ({error})"[:200])
    except Exception as error:  # noqa: BLE001 - a user's template may raise anything on foreign rows
        what = f"a template in data.columns fails on the row: {type(error).__name__}: {error}"[:300]
        why = "there is no text to train on"
        return Problem("TS104", what, where, why, "write a template that works for every row, or correct the row")


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["tojson"] = _json
    return environment.from_string(source)


def _json(value: Any, indent: int | None = None) -> str:
    """JSON with text not escaped for HTML, and keys in their original order."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
