"""Makes the reference pages out of the code and the benchmarks' results: see PAGES. `make docs` runs it.

The test in tests/docs fails when a page is not what this makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from tunesmith.errors import CODES
from tunesmith.recipe import QUALITY, SCREENING, Recipe, Rule, Section

FOLDER = Path(__file__).resolve().parent
COMMANDS = ("", "demo", "run", "plan", "augment", "prepare", "review", "train", "export", "evaluate", "compare")


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is None:
        return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    arguments = get_args(annotation)
    if str(get_origin(annotation)).endswith("Literal"):
        return " \\| ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if get_origin(annotation) is list:
        return f"list of {_type_name(arguments[0])}"
    if str(get_origin(annotation)).endswith("Annotated'>") or hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    return " \\| ".join(_type_name(argument) for argument in arguments)


def _field_row(name: str, field: FieldInfo) -> str:
    default = "**required**" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    if field.default is None:
        default = "none"
    described = " ".join((field.description or "").split())  # a table's row is one line
    return f"| `{name}` | {_type_name(field.annotation)} | {default} | {described} |"


def _sections() -> dict[str, type[Section]]:
    return _inner_sections(Recipe)


def _inner_sections(model: type[Section]) -> dict[str, type[Section]]:
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    return found


def recipe_page() -> str:
    """All keys of a recipe, by section."""
    head = ["| key | type | default | what |", "|---|---|---|---|"]
    lines = [
        "# The recipe",
        "",
        "Made by `make docs` from `src/tunesmith/recipe/`. A recipe is YAML; keys that it does not name have their defaults,",
        "unknown keys are refused. `--set section.key=value` changes a key on the command line. `auto` is settled by the stage",
        "that knows the facts, which records the value and the reason.",
        "",
        *head,
    ]
    sections = _sections()
    lines += [_field_row(name, field) for name, field in Recipe.model_fields.items() if name not in sections]
    for section, model in sections.items():
        lines += ["", f"## {section}", "", (model.__doc__ or "").strip(), "", *head]
        inner = _inner_sections(model)
        lines += [_field_row(name, field) for name, field in model.model_fields.items() if name not in inner]
        for name, part in inner.items():
            lines += ["", f"### {section}.{name}", "", (part.__doc__ or "").strip(), "", *head]
            lines += [_field_row(key, field) for key, field in part.model_fields.items()]
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
    claims = {claim["name"]: claim for claim in _result("plan_accuracy")["claims"]}
    rows = [f"| {text} | {claims[name]['value']:.2g} {claims[name]['unit']} |" for name, text in PLAN_CLAIMS.items()]
    return ["| what | at most |", "|---|---|", *rows]


def _plan_qwen() -> list[str]:
    value = _values("plan_accuracy")
    rows = [f"| {text} | {value[f'qwen2_7b_{name}_gib']:.1f} |" for name, text in PLAN_TABLE.items()]
    stock = [f"| stock {name} | {value[f'qwen2_7b_stock_{name}_gib']:.1f} |" for name in ("full", "lora", "qlora")]
    return ["| way | GiB on one GPU |", "|---|---|", *rows, *stock]


_RESULTS = FOLDER.parent / "benchmarks" / "results"


def _result(name: str) -> Any:
    return json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _values(name: str) -> dict[str, float]:
    """The claims of a result."""
    return {claim["name"]: claim["value"] for claim in _result(name)["claims"]}


def _measured(name: str) -> list[str]:
    """A result's files, one for each processor: NAME.json, NAME_PROCESSOR.json; none where it was not measured yet."""
    return sorted(path.stem for path in (*_RESULTS.glob(f"{name}.json"), *_RESULTS.glob(f"{name}_*.json")))


_SETS = {"demo": "rows with one long instruction", "alpaca": "alpaca_demo"}
_TIMES, _SHARE = "{:.1f} x", "{:.2f} x"
_METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


@dataclass(frozen=True)
class Speed:
    """A row of the tables of speed: what is compared, in which result, and its claims with how they are written."""

    what: str
    result: str
    cells: tuple[tuple[str, str], ...]
    short: bool = False  # whether the README has it


def _pair(what: str, result: str, time: str, memory: str, suffix: str = "") -> Speed:
    """A row with rows a second and peak memory, as it comes and in float32."""
    names = ((time + suffix, _TIMES), (memory + suffix, _SHARE))
    return Speed(what, result, names, short=not suffix)


#: Against peers: what, rows a second, peak memory.
SPEED_PEERS = (
    *(
        _pair(
            f"{label}, {data}{text}",
            "train_speed",
            f"rows_per_second_ratio_{key}_{method}",
            f"peak_memory_ratio_{key}_{method}",
            suffix,
        )
        for key, data in _SETS.items()
        for method, label in _METHODS.items()
        for suffix, text in (("", ""), ("_float32", ", both in float32"))
    ),
    Speed(
        "LoRA, rows with one long instruction: against TRL as it comes",
        "train_speed",
        (("rows_per_second_ratio_to_trl_defaults", _TIMES), ("peak_memory_ratio_to_trl_defaults", _SHARE)),
    ),
    *(
        _pair(
            f"LoRA, {data}: against LLaMA-Factory at its best",
            "train_speed",
            f"rows_per_second_ratio_to_llamafactory_{key}_lora",
            f"peak_memory_ratio_to_llamafactory_{key}_lora",
        )
        for key, data in _SETS.items()
    ),
    *(
        _pair(f"DPO, LoRA, hh-rlhf{text}", "dpo_speed", "dpo_pairs_per_second_ratio", "dpo_peak_memory_ratio", suffix)
        for suffix, text in (("", ""), ("_float32", ", both in float32"))
    ),
    Speed(
        "MMLU 5-shot scoring against lm-evaluation-harness",
        "mmlu_scoring",
        (("mmlu_scoring_ratio_to_lm_eval", _TIMES),),
        short=True,
    ),
    Speed(
        "preparing rows, all rules on, against TRL's tokenizing",
        "prepare",
        (("rows_per_second_ratio_to_trl", _SHARE),),
        short=True,
    ),
)

#: Against the machine and against other code: what, figure.
SPEED_PARTS = tuple(
    Speed(what, result, ((name, form),))
    for result, what, name, form in (
        ("train_speed", "full: share of the FLOP floor, at oneDNN's rate", "flop_floor_fraction_full", "{:.0%}"),
        ("train_speed", "LoRA: share of the FLOP floor, at oneDNN's rate", "flop_floor_fraction_lora", "{:.0%}"),
        (
            "train_speed",
            "full: the same at the rate of torch's own operators",
            "flop_floor_fraction_full_at_torch_rate",
            "{:.0%}",
        ),
        (
            "train_speed",
            "LoRA: the same at the rate of torch's own operators",
            "flop_floor_fraction_lora_at_torch_rate",
            "{:.0%}",
        ),
        ("train_speed", "losses of 50 steps against TRL's, largest difference (nats)", "loss_max_abs_diff_to_trl", "{:.1e}"),
        (
            "train_speed",
            "gradients of trees, float64, largest relative difference",
            "packed_gradient_max_rel_diff_fp64",
            "{:.1e}",
        ),
        ("dpo_speed", "DPO: losses against TRL's, largest difference (nats)", "dpo_largest_difference_of_losses", "{:.1e}"),
        (
            "mmlu_scoring",
            "log-likelihoods against lm-evaluation-harness's, largest difference (nats)",
            "mmlu_scoring_max_abs_diff",
            "{:.1e}",
        ),
        ("kernels", "attention along trees against PyTorch's kernel, forward", "attention_time_ratio", _TIMES),
        ("kernels", "attention along trees against PyTorch's kernel, backward", "attention_backward_time_ratio", _TIMES),
        ("kernels", "a weight's gradient against torch's operator", "weight_gradient_time_ratio", _TIMES),
        ("kernels", "a weight's gradient against oneDNN", "weight_gradient_time_ratio_to_onednn", _TIMES),
        ("kernels", "norms, gates and rotations against torch's operators", "number_by_number_time_ratio", _TIMES),
        ("kernels", "loss of a frozen head against torch's linear_cross_entropy", "frozen_head_loss_time_ratio", _TIMES),
        ("kernels", "loss of kept logits against torch's operators", "kept_logits_loss_time_ratio", _TIMES),
    )
)


#: How the processors of the results are called, by what tells them apart.
_GENERATIONS = {
    "family 6, model 207": "Intel Xeon, 5th generation",
    "family 25, model 17": "AMD Zen 4",
    "family 26": "AMD Zen 5",
}


def _generation(result: str) -> str:
    processor = _result(result)["hardware"].get("processor", "")
    return next((name for told, name in _GENERATIONS.items() if told in processor), processor)


def _speed(rows: Sequence[Speed], columns: Sequence[str], *, short: bool = False) -> list[str]:
    """The rows that were measured, with the processors they were measured on."""
    lines = [f"| what | {' | '.join(columns)} | on |", "|---|" + "---|" * len(columns) + "---|"]
    for row in rows:
        if row.short or not short:
            lines += [f"| {' | '.join([row.what, *cells])} |" for cells in _cells(row, len(columns))]
    return lines


def _cells(row: Speed, columns: int) -> Iterator[list[str]]:
    """A row's figures on each processor that it was measured on, and that processor."""
    for result in _measured(row.result):
        found = _values(result)
        cells = [form.format(found[name]) if name in found else "" for name, form in row.cells]
        if any(cells):
            yield [*cells, *[""] * (columns - len(cells)), _generation(result)]


_PEER_COLUMNS = ("speed, times theirs", "peak memory, times theirs")


def speed_page() -> str:
    """docs/speed.md with its tables."""
    tables = {"speed": _speed(SPEED_PEERS, _PEER_COLUMNS), "parts": _speed(SPEED_PARTS, ("measured",))}
    return _with_tables("speed.md", tables)


def readme() -> str:
    """README.md with its table of speeds, wins and losses alike."""
    return _with_tables("../README.md", {"speed": _speed(SPEED_PEERS, _PEER_COLUMNS, short=True)})


def plan_page() -> str:
    """docs/plan.md with its tables."""
    return _with_tables("plan.md", {"accuracy": _plan_accuracy(), "qwen": _plan_qwen()})


#: What docs/data.md says of each claim of the prepare benchmarks.
PREPARE_CLAIMS = {
    "duplicates": {
        "exact_duplicate_recall": "1,000 exact copies: found",
        "near_duplicate_recall": "1,000 near copies, Jaccard 0.8 and above: found",
        "false_duplicate_rate": "found rows whose index is below the threshold",
    },
    "injection": {
        "injection_recall": "recall on the 150 prompts kept for measuring",
        "injection_precision": "precision, those with GSM8K's questions",
    },
}


def _prepare(part: str) -> list[str]:
    value = _values("prepare")
    return [
        "| what | share |",
        "|---|---|",
        *(f"| {text} | {value[name]:.1%} |" for name, text in PREPARE_CLAIMS[part].items()),
    ]


def _rules(rules: dict[str, Rule]) -> list[str]:
    rows = (f"| `{name}` | {rule.default}{' (or fix)' if rule.fixable else ''} | {rule.what} |" for name, rule in rules.items())
    return ["| rule | default | what it finds |", "|---|---|---|", *rows]


def data_page() -> str:
    """docs/data.md with its tables."""
    tables = {part: _prepare(part) for part in PREPARE_CLAIMS} | {"quality": _rules(QUALITY), "screening": _rules(SCREENING)}
    return _with_tables("data.md", tables)


#: The rows of docs/promises.md: what, and how its claims are written.
PROMISES = (
    ("configurations stopped twice each, bits that differ", "{resume_configurations:.0f}, {resume_differing_bits:.0f}"),
    ("SIGKILL at random moments, survived", "{sigkill_moments:.0f}, {sigkill_survived:.0f}"),
    ("SIGKILL before each file call of a save, lost steps", "{sigkill_file_calls:.0f}, {steps_lost_or_repeated:.0f}"),
    ("damaged savepoints, found", "{corruptions_tried:.0f}, {corruptions_found:.0f}"),
    ("whole savepoints, false alarms", "{clean_loads:.0f}, {false_alarms:.0f}"),
    ("disk full at a file of a save, survived", "{disk_full_moments:.0f}, {disk_full_survived:.0f}"),
    ("models whose numbers are none, stopped before a step", "{nonfinite_cases:.0f}, {nonfinite_stopped:.0f}"),
    ("out of memory: largest difference of a step's loss (nats)", "{oom_loss_max_abs_diff:.1e}"),
    ("hostile inputs, refused", "{hostile_inputs_tried:.0f}, {hostile_inputs_refused:.0f}"),
    ("two processes killed at random moments, survived", "{two_process_moments:.0f}, {two_process_survived:.0f}"),
    ("stages killed at random and begun again, those that differ", "{stages_killed:.0f}, {stages_differing:.0f}"),
    ("commands without a network (the demo is one), attempts to connect", "{offline_commands:.0f}, {connection_attempts:.0f}"),
)


def promises_page() -> str:
    """docs/promises.md with its table."""
    values = _values("promises")
    known = [(what, form) for what, form in PROMISES if {part[1] for part in Formatter().parse(form)} <= {*values, None}]
    rows = [f"| {what} | {form.format(**values)} |" for what, form in known]
    return _with_tables("promises.md", {"promises": ["| what | measured |", "|---|---|", *rows]})


_GIB = 2**30
_GPU_WAYS = {
    "gradient_checkpointing": "checkpointing",
    "optimizer_in_backward": "update in backward",
    "optimizer_offloading": "states offloaded",
    "torch_compile": "compiled",
    "use_liger_kernel": "Liger",
}


def _gpu_case(row: dict[str, Any]) -> str:
    """The first cells of a case's row."""
    named = {"keep_attention": "checkpointing but for attention"}
    ways = ", ".join(named.get(value, _GPU_WAYS.get(key, str(value))) for key, value in row["train"].items() if value)
    name = ("stock " if row["side"] == "stock" else "") + _METHODS[row["method"]]
    return f"| {row['model'].rpartition('/')[2]} | {name} | {row['rows']} x {row['length']:,} | {ways} |"


def gpu_traced(rows: list[dict[str, Any]]) -> list[str]:
    """What is planned and traced for a card."""
    head = "| model | method | rows x tokens | way | traced GiB | plan GiB | on the device | s a step | tokens/s |"
    made = [
        f"{_gpu_case(row)} {row['traced_bytes'] / _GIB:.2f} | {row['planned_allocated_bytes'] / _GIB:.2f} "
        f"| {row['planned_bytes'] / _GIB:.1f} | {row['planned_seconds']:.2f} "
        f"| {row['rows'] * row['length'] / row['planned_seconds']:,.0f} |"
        for row in rows
    ]
    return [head, "|---|---|---|---|---|---|---|---|---|", *made]


def gpu_measured(result: dict[str, Any]) -> list[str]:
    """The tables of one GPU: what was measured, how far the plan was off, and rows with one instruction beside TRL."""
    name = result["hardware"]["name"]
    head = "| model | method | rows x tokens | way | peak GiB | planned | s a step | planned | tokens/s |"
    lines = [f"### {name}", "", head, "|---|---|---|---|---|---|---|---|---|"]
    for row in (row for row in result["rows"] if 3 in row["tables"]):
        memory = 100 * (row["planned_bytes"] / row["peak_memory_bytes"] - 1)
        seconds = 100 * (row["planned_seconds"] / row["seconds_per_step"] - 1)
        lines.append(
            f"{_gpu_case(row)} {row['peak_memory_bytes'] / _GIB:.2f} | {memory:+.1f} % "
            f"| {row['seconds_per_step']:.3f} | {seconds:+.0f} % | {row['tokens_per_second']:,.0f} |"
        )
    sharing = [row for row in result["rows"] if 4 in row["tables"]]
    if sharing:
        lines += ["", f"Rows of {sharing[0]['length']} tokens, {sharing[0]['shared']} of them one instruction:", ""]
        lines += ["| side | rows/s | peak GiB |", "|---|---|---|"]
        lines += [
            f"| {row['side'].replace('_', ', ')} | {row['rows_per_second']:.1f} | {row['peak_memory_bytes'] / _GIB:.1f} |"
            for row in sharing
        ]
    by_reason: dict[str, list[str]] = {}
    for left in result["left_out"]:
        by_reason.setdefault(left["reason"], []).append(left["part"])
    lines += ["", *(f"Left out ({reason}): {', '.join(parts)}." for reason, parts in by_reason.items())] if by_reason else []
    return [*lines, ""]


def gpu_operators(result: dict[str, Any]) -> list[str]:
    """What one GPU reaches operator by operator."""
    lines = [f"### {result['hardware']['name']}", "", "| operator | ms | |", "|---|---|---|"]
    units = {"tflops": "TFLOP/s", "gigabytes_per_second": "GB/s"}
    for row in result["rows"]:
        rate = [f"{row[key]:,.0f} {unit}" for key, unit in units.items() if key in row]
        lines.append(f"| {row['part']} | {row['milliseconds']:.3f} | {rate[0] if rate else ''} |")
    return [*lines, ""]


def gpu_page() -> str:
    """docs/gpu.md with the tables of every GPU that was measured, and what is traced."""
    names = sorted(path.stem for path in (FOLDER.parent / "benchmarks" / "results").glob("gpu_*.json"))
    found = {name: result for name, result in zip(names, map(_result, names), strict=True) if result["kind"] == "measured"}
    each = {name: result for name, result in found.items() if not name.endswith("_operators")}
    measured = [line for result in each.values() for line in gpu_measured(result)] or ["No GPU has been measured yet."]
    operators = [line for name, result in found.items() if name not in each for line in gpu_operators(result)]
    tables = {"measured": measured, "operators": operators, "traced": gpu_traced(_result("gpu_traced")["rows"])}
    return _with_tables("gpu.md", tables)


def _with_tables(page: str, tables: dict[str, list[str]]) -> str:
    """A page with its tables made again from the benchmarks' results; the rest stays as it is written."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    for name, rows in tables.items():
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        text = (
            head
            + "\n".join([f"<!-- {name} -->", *rows, "<!-- end -->"])
            + rest[rest.index("<!-- end -->") + len("<!-- end -->") :]
        )
    return text


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page, "errors.md": errors_page, "plan.md": plan_page, "data.md": data_page}
PAGES |= {"gpu.md": gpu_page, "promises.md": promises_page, "speed.md": speed_page, "../README.md": readme}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
        print(f"docs/{page}")
