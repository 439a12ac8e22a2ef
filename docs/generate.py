"""Makes the reference pages out of the code: docs/recipe.md, docs/cli.md, docs/errors.md. `make docs` runs it.

The test in tests/docs fails when a page is not what this makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.errors import CODES
from tunesmith.recipe import Recipe, Section

FOLDER = Path(__file__).resolve().parent
COMMANDS = ("", "demo", "run", "plan", "prepare", "train", "export", "evaluate", "compare")


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is None:
        return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    arguments = get_args(annotation)
    if str(get_origin(annotation)).endswith("Literal"):
        return " \\| ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is list:
        return f"list of {_type_name(arguments[0])}"
    if str(get_origin(annotation)).endswith("Annotated'>") or hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    return " \\| ".join(_type_name(argument) for argument in arguments)


def _field_row(name: str, field: FieldInfo) -> str:
    default = "**required**" if field.default is PydanticUndefined else f"`{field.default}`"
    if field.default is None:
        default = "none"
    return f"| `{name}` | {_type_name(field.annotation)} | {default} | {field.description} |"


def _sections() -> dict[str, type[Section]]:
    found = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    return found


def recipe_page() -> str:
    """All keys of a recipe, by section."""
    head = ["| key | type | default | what |", "|---|---|---|---|"]
    lines = [
        "# The recipe",
        "",
        "Made by `make docs` from `src/tunesmith/recipe.py`. A recipe is YAML; keys that it does not name have their defaults,",
        "unknown keys are refused. `--set section.key=value` changes a key on the command line. `auto` is settled by the stage",
        "that knows the facts, which records the value and the reason.",
        "",
        *head,
    ]
    sections = _sections()
    lines += [_field_row(name, field) for name, field in Recipe.model_fields.items() if name not in sections]
    for section, model in sections.items():
        lines += ["", f"## {section}", "", (model.__doc__ or "").strip(), "", *head]
        lines += [_field_row(name, field) for name, field in model.model_fields.items()]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """The help of every command, as an 80-column terminal shows it."""
    lines = ["# The command line", "", "Made by `make docs` from `tunesmith --help`.", ""]
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "tunesmith", *([command] if command else []), "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
        text = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
        text = text.replace("python -m tunesmith", "tunesmith")
        lines += [f"## tunesmith {command}".rstrip(), "", "```text", text, "```", ""]
    return "\n".join(lines)


def errors_page() -> str:
    """All codes of errors."""
    lines = ["# Error codes", "", "Made by `make docs` from `src/tunesmith/errors.py`. A code never changes its meaning.", ""]
    lines += ["| code | name |", "|---|---|", *(f"| {code} | {name} |" for code, name in CODES.items())]
    return "\n".join(lines) + "\n"


#: What docs/plan.md says of each claim of benchmarks/plan_accuracy.py.
PLAN_CLAIMS = {
    "formula_vs_trace_max_error_percent": "closed form against the trace: 5 models of 7 to 9 B, 3 methods, 2 lengths, 2 ways",
    "formula_under_trace_max_percent": "how far it is under the trace at the most",
    "trace_vs_measured_cpu_max_error_percent": "trace against PyTorch's allocation events: SmolLM2-135M on CPU, 12 ways",
    "plan_vs_measured_cpu_max_error_percent": "closed form against the same",
    "step_time_max_error_percent": "seconds a step after `--calibrate` against a run's: 3 methods, 2 micro-batches",
    "plan_seconds_405b": "the command for a 405 B model, from start to end",
    "trace_seconds_7b": "the command with `--trace` for a 7 B model",
}
PLAN_TABLE = {"full_fused": "full, bf16 with fused AdamW", "full_lean": "full, 8-bit states, update in the backward pass"}
PLAN_TABLE |= {"lora": "LoRA, r 16", "qlora": "QLoRA, r 16"}


def _plan_accuracy() -> list[str]:
    claims = {claim["name"]: claim for claim in _plan_result()["claims"]}
    rows = [f"| {text} | {claims[name]['value']:.2g} {claims[name]['unit']} |" for name, text in PLAN_CLAIMS.items()]
    return ["| what | at most |", "|---|---|", *rows]


def _plan_qwen() -> list[str]:
    value = {claim["name"]: claim["value"] for claim in _plan_result()["claims"]}
    rows = [f"| {text} | {value[f'qwen2_7b_{name}_gib']:.1f} |" for name, text in PLAN_TABLE.items()]
    stock = [f"| stock {name} | {value[f'qwen2_7b_stock_{name}_gib']:.1f} |" for name in ("full", "lora", "qlora")]
    return ["| way | GiB on one GPU |", "|---|---|", *rows, *stock]


def _plan_result() -> Any:
    path = FOLDER.parent / "benchmarks" / "results" / "plan_accuracy.json"
    return json.loads(path.read_text(encoding="utf-8"))


def plan_page() -> str:
    """docs/plan.md with its tables made again from the benchmark's result; the rest stays as it is written."""
    text = (FOLDER / "plan.md").read_text(encoding="utf-8")
    for name, rows in (("accuracy", _plan_accuracy()), ("qwen", _plan_qwen())):
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        text = (
            head
            + "\n".join([f"<!-- {name} -->", *rows, "<!-- end -->"])
            + rest[rest.index("<!-- end -->") + len("<!-- end -->") :]
        )
    return text


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page, "errors.md": errors_page, "plan.md": plan_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
        print(f"docs/{page}")
