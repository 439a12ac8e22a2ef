"""The columns of a row under the names that its format wants: renamed, or written by a template over the row."""

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
    """The row with the columns that `data.columns` names, under the format's names; or the problem of a row that lacks one.

    A value with `{{` or `{%` is a Jinja template: it sees the row's columns by their names and the whole as `row`, and gives
    text. Columns that are renamed go, those that templates read stay beside what they wrote.

    Raises DataError for a template that does not end.
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
        what = f"a template of data.columns does not end: {error}"
        problem = Problem("TS124", what, where, "no row would come through", "write the template so that it ends")
        raise DataError(problem) from error
    except UndefinedError as error:
        return wrong_columns(row, where, f"with what data.columns reads ({error})"[:200])
    except Exception as error:  # noqa: BLE001 - a user's template may raise anything on foreign rows
        what = f"a template of data.columns fails on the row: {type(error).__name__}: {error}"[:300]
        why = "there is no text to train on"
        return Problem("TS104", what, where, why, "write the template so that it holds for each row, or correct the row")


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["tojson"] = _json
    return environment.from_string(source)


def _json(value: Any, indent: int | None = None) -> str:
    """Text as it is, not escaped for HTML, and keys in their order."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
