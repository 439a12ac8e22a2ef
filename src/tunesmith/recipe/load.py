"""Reads and fully checks a YAML recipe, and writes it; the origin of each value is a comment for readers, never read back.

Unknown keys are refused with the nearest known name, and all problems are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tunesmith.errors import Problem, RecipeError
from tunesmith.recipe.checks import recipe_problems
from tunesmith.recipe.data import NAMED_TEMPLATES, Part, PartSection
from tunesmith.recipe.keys import unknown_keys, validation_problems
from tunesmith.recipe.model import Origin, Recipe, ResolvedRecipe
from tunesmith.recipe.objectives import OBJECTIVES, SamplingSection, absolute_reward


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """The recipe in a YAML file, with `key.subkey=value` overrides applied.

    Data paths are resolved relative to the recipe's folder. Raises RecipeError with every problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            Problem("TS001", f"cannot read the recipe: {error}", str(path), "a run starts from its recipe", "check the path")
        ) from error
    return parse_recipe(text, source=str(path), base=path.resolve().parent, overrides=overrides)


def parse_recipe(text: str, source: str, base: Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """The recipe in YAML `text`; `source` names it in messages, relative paths are resolved against `base`."""
    values = _parse_yaml(text, source)
    origins: dict[str, Origin] = dict.fromkeys(_dotted(values), "file")
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value, override)
        origins[".".join(key.split(".")[:2])] = "override"
    problems = [*unknown_keys(Recipe, values, source)]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(Recipe, error, source)
        raise RecipeError(problems) from error
    problems += recipe_problems(recipe, source)
    if problems:
        raise RecipeError(problems)
    recipe = _with_absolute_paths(recipe, base)
    defaults: dict[str, Origin] = dict.fromkeys(_dotted(recipe.model_dump(mode="json")), "default")
    known = {key: origin for key, origin in origins.items() if key in defaults}
    return ResolvedRecipe(recipe=recipe, origins=defaults | known)


def dump_recipe(resolved: ResolvedRecipe) -> str:
    """YAML of the whole recipe, with each value's origin as a comment; `parse_recipe` reads it back."""
    lines: list[str] = []
    dumped = resolved.recipe.model_dump(mode="json")
    for key, value in dumped.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {_yaml_line(k, v)}  # {resolved.origins[f'{key}.{k}']}" for k, v in value.items()]
        else:
            lines.append(f"{_yaml_line(key, value)}  # {resolved.origins[key]}")
    return "\n".join(lines) + "\n"


def _yaml_line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=False, width=10**9).strip()[1:-1]


class _OnceLoader(yaml.SafeLoader):
    """YAML without duplicate keys, where the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    why = "the recipe is the run's only config"
    try:
        values = _OnceLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        detail = getattr(error, "problem", None) or str(error)
        raise RecipeError(Problem("TS001", f"not valid YAML: {detail}", where, why, "correct that line")) from error
    except RecursionError as error:
        raise RecipeError(Problem("TS001", "nested too deeply", source, why, "flatten the recipe")) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = "nothing" if values is None else type(values).__name__
        fix = "write at least `model: smollm2-135m-instruct` and `data: {train: rows.jsonl}`"
        raise RecipeError(Problem("TS001", f"a recipe is a mapping of names to values, found {found}", source, why, fix))
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(
            Problem("TS003", f"{text!r} is not key=value", "override", "it would change nothing", "write train.max_steps=10")
        )
    return key, _parse_yaml(f"value: {value}", f"override {key}")["value"]


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *path, last = key.split(".")
    section: Any = values
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            why = "the override reaches into a plain value"
            raise RecipeError(Problem("TS003", f"{name!r} is not a section", f"override {override!r}", why, "check the key"))
    section[last] = value


def _dotted(values: Mapping[str, Any]) -> Iterable[str]:
    """Names of the recipe's values: top-level keys, and section keys as `section.key`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    def absolute(value: str | None) -> str | None:
        return None if value is None else str((base / value).resolve())

    def rows(value: str | None) -> str | None:
        return value if not value or value.startswith("hub:") else absolute(value)

    def part(value: Part) -> Part:
        return value.model_copy(update={"path": rows(value.path)})

    data: dict[str, Any] = {"train": rows(recipe.data.train), "sources": [part(source) for source in recipe.data.sources]}
    data["test"] = part(recipe.data.test) if isinstance(recipe.data.test, PartSection) else rows(recipe.data.test)
    if recipe.data.chat_template not in NAMED_TEMPLATES:
        data["chat_template"] = absolute(recipe.data.chat_template)
    data["review"] = absolute(recipe.data.review)
    overlap = {key: absolute(value) for key, value in recipe.data.overlap}
    evaluate = {key: absolute(getattr(recipe.evaluate, key)) for key in ("json_schema", "mmlu")}
    sampling = {
        name: section.model_copy(update={"reward_funcs": [absolute_reward(each, base) for each in section.reward_funcs]})
        for name in OBJECTIVES
        if isinstance(section := getattr(recipe, name, None), SamplingSection)
    }
    model = recipe.model
    if model.startswith((".", "/", "~")):
        model = str((base / Path(model).expanduser()).resolve())
    return recipe.model_copy(
        update={
            "model": model,
            "data": recipe.data.model_copy(update=data | {"overlap": recipe.data.overlap.model_copy(update=overlap)}),
            "augment": recipe.augment.model_copy(update={"out": absolute(recipe.augment.out)}),
            "evaluate": recipe.evaluate.model_copy(update=evaluate),
            **sampling,
        }
    )
