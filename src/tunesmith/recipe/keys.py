"""Problems with the keys and values of a recipe, found by checking it against its sections."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from tunesmith.errors import Problem
from tunesmith.recipe.data import SourceSection
from tunesmith.recipe.sections import Section


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _all_keys(model: type[Section], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        yield f"{prefix}{name}"
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")


def unknown_keys(model: type[Section], values: Mapping[str, Any], source: str) -> Iterable[Problem]:
    """Keys that the model does not have, each with its nearest known key."""
    known = list(_all_keys(model))
    for dotted in _unknown(model, values, ()):
        why = "a key that nothing reads would silently have no effect"
        yield Problem("TS002", f"unknown key {dotted!r}", source, why, _nearest(dotted, known))


def _unknown(model: type[Section], values: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    for key, value in values.items():
        field = model.model_fields.get(str(key))
        if field is None:
            yield ".".join((*path, str(key)))
        elif isinstance(value, dict) and (inner := _section_of(field.annotation)) is not None:
            yield from _unknown(inner, value, (*path, str(key)))


def _unknown_in_list(loc: Sequence[str | int], source: str) -> Problem:
    dotted = ".".join(map(str, loc))
    why = "a key that nothing reads would silently have no effect"
    known = ", ".join(SourceSection.model_fields)
    return Problem("TS002", f"unknown key {dotted!r}", source, why, f"a source has {known}")


def _nearest(dotted: str, known: Sequence[str]) -> str:
    last = dotted.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known}
    match = difflib.get_close_matches(dotted, known, 1, 0.75) or [
        by_last[name] for name in difflib.get_close_matches(last, list(by_last), 1, 0.7)
    ]
    return f"did you mean {match[0]!r}?" if match else "see docs/recipe.md for all keys"


def validation_problems(model: type[Section], error: ValidationError, source: str) -> Iterable[Problem]:
    """Pydantic's errors as problems, one per key (a union reports each of its branches)."""
    items, known = error.errors(include_url=False), set(_all_keys(model))
    seen: set[str] = set()
    for item in items:
        if item["type"] == "extra_forbidden":
            if any(isinstance(part, int) for part in item["loc"]):  # inside a list, where unknown_keys does not look
                yield _unknown_in_list(item["loc"], source)
            continue
        names = [str(part) for part in item["loc"]]
        while len(names) > 1 and ".".join(names) not in known:
            names.pop()  # the rest names a branch of a union, not a key
        dotted = ".".join(names) or "recipe"
        if dotted in seen:
            continue
        seen.add(dotted)
        if item["type"] == "missing":
            yield Problem("TS004", f"key {dotted!r} is missing", source, "there is no sensible default", f"add {dotted!r}")
        else:
            given = repr(item["input"])
            allowed = "; ".join(dict.fromkeys(e["msg"] for e in items if e["loc"][: len(names)] == item["loc"][: len(names)]))
            what = f"{dotted} = {given[:80]}: {allowed}"
            yield Problem("TS003", what, source, "the run would not do what the recipe says", f"correct {dotted!r}")
