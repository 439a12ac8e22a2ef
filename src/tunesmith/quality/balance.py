"""Down-sampling of classes with too many rows, and the class of a row."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from tunesmith.errors import DataError, Problem, RecipeError
from tunesmith.io.signals import TEMPLATE_SECONDS, TooLongError, cpu_limit
from tunesmith.io.templates import BoundedEnvironment
from tunesmith.quality.findings import Message, last_answer
from tunesmith.recipe import BalanceSection


class Label:
    """Computes a row's class with the expression in `data.balance.label`.

    Raises RecipeError for an invalid expression, DataError for one that does not terminate.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        try:
            with cpu_limit(TEMPLATE_SECONDS):
                self._compiled = BoundedEnvironment().compile_expression(expression)
        except TooLongError as error:
            raise _endless(error) from error
        except TemplateError as error:
            why, fix = "rows could not be assigned to classes", "give a column, or an expression such as answer_json.intent"
            problem = Problem("TS003", f"not a valid expression: {error}", "data.balance.label", why, fix)
            raise RecipeError(problem) from error

    def __call__(self, row: Mapping[str, Any], messages: Sequence[Message]) -> str | None:
        """The class as text; None if the row has none, or if the expression fails on it."""
        answer = last_answer(messages)
        names = {"messages": list(messages), "answer": answer, "answer_json": _json(answer), "row": dict(row)}
        try:
            with cpu_limit(TEMPLATE_SECONDS):
                value = self._compiled(**{**row, **names})
        except TooLongError as error:
            raise _endless(error) from error
        except Exception:  # noqa: BLE001 - a user's expression may raise anything on foreign rows
            return None
        return None if value is None or value == "" else str(value)


def _endless(error: TooLongError) -> DataError:
    what, why = f"the expression does not terminate: {error}", "no row could be processed"
    return DataError(Problem("TS124", what, "data.balance.label", why, "write an expression that terminates"))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def balance(labels: Sequence[str | None], settings: BalanceSection, seed: int) -> list[int]:
    """Sorted indices of the rows to keep: per class at most `cap` rows and at most `ratio` times the smallest class.

    Rows are drawn with a seed within each class; rows without a class are kept.
    """
    sizes = Counter(label for label in labels if label is not None)
    limits = [settings.cap] if settings.cap is not None else []
    if settings.ratio is not None and sizes:
        limits.append(max(1, int(settings.ratio * min(sizes.values()))))
    if not limits:
        return list(range(len(labels)))
    limit = min(limits)
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        if label is not None:
            members.setdefault(label, []).append(index)
    kept = {index for index, label in enumerate(labels) if label is None}
    for label, rows in sorted(members.items()):
        draw = random.Random(f"{seed} {label}")
        kept.update(rows if len(rows) <= limit else draw.sample(rows, limit))
    return sorted(kept)
