"""The `plan` command: makes a plan from the command-line options, prints it and writes it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.errors import PlanError, Problem
from tunesmith.hardware.catalogue import Device, find_device, read_gpus, this_device
from tunesmith.io.atomic import check_replaceable
from tunesmith.io.terminal import make_console
from tunesmith.planner import text
from tunesmith.planner.datafacts import DataFacts, assumed, read_facts
from tunesmith.planner.decide import Asks
from tunesmith.planner.plan import encoder_for, fixed_keys, plan_for
from tunesmith.planner.result import Plan
from tunesmith.recipe import Method, ResolvedRecipe, load_recipe, parse_recipe
from tunesmith.stages.plan import PLAN, write_plan

_WHY = "the plan would answer a different question"


@dataclass(frozen=True)
class Request:
    """The options of the `plan` command."""

    model: str
    gpu: str | None
    data: Path | None
    rows: int
    length: int
    methods: list[Method]
    budget: str | None
    deadline: str | None
    latency_critical: bool
    gpus: Path | None
    overrides: list[str]


def show(asked: Request, out: Path | None, *, as_json: bool, calibrate: bool, trace: bool, errors: Console) -> None:
    """Make the plan, print it, and write it if `out` names a folder.

    Raises RunError if `out` holds something else; PlanError, at the end, if nothing can be recommended.
    """
    if out is not None:
        check_replaceable(out, PLAN)
    asks = read_asks(asked)
    gpus = read_gpus(asked.gpus)
    device = this_device(gpus) if asked.gpu is None else find_device(asked.gpu, gpus)
    resolved = recipe_of(asked)
    facts = facts_of(asked, resolved)
    if calibrate:
        _calibrate(asked, resolved, facts, device, gpus, errors)
    fixed = fixed_keys(resolved)
    made = plan_for(resolved.recipe, facts, device, gpus, methods=asked.methods, asks=asks, fixed=fixed)
    if out is not None:
        write_plan(made, resolved, out)
    if as_json:
        print(json.dumps(made.as_dict(), indent=2))
    else:
        print_plan(made, out, make_console())
    if trace:
        _trace(made, asked, errors if as_json else make_console())
    if made.recommended is None:
        raise PlanError(made.problem())


def recipe_of(asked: Request) -> ResolvedRecipe:
    """The recipe to plan: the given one, or the defaults for the model."""
    path = Path(asked.model)
    overrides = list(asked.overrides)
    if path.suffix in {".yaml", ".yml"}:
        if asked.data is not None:
            overrides.append(f"data.train={json.dumps(str(asked.data.resolve()))}")
        return load_recipe(path, overrides)
    train = "train.jsonl" if asked.data is None else str(asked.data.resolve())
    base = f"model: {json.dumps(asked.model)}\ndata: {{train: {json.dumps(train)}}}\n"
    return parse_recipe(base, "the command line", Path.cwd(), overrides)


def facts_of(asked: Request, resolved: ResolvedRecipe) -> DataFacts:
    """Facts of the given data; without data, of the assumed number and length of rows."""
    from_recipe = Path(asked.model).suffix in {".yaml", ".yml"}
    if asked.data is None and not from_recipe:
        for name, value in (("--rows", asked.rows), ("--length", asked.length)):
            if value < (1 if name == "--rows" else 8):
                fix = f"set {name} to at least {1 if name == '--rows' else 8}"
                raise PlanError(Problem("TS703", f"{name} {value} is too small", name, _WHY, fix))
        return assumed(asked.rows, asked.length, resolved.recipe.objective)
    return read_facts(resolved.recipe.data, encoder_for(resolved.recipe.model), resolved.recipe.objective)


def read_asks(asked: Request) -> Asks:
    """The budget in dollars and the deadline in hours, parsed from the options."""
    budget = hours = None
    if asked.budget is not None:
        match = re.fullmatch(r"\s*\$?\s*(\d+(?:\.\d+)?)\s*(?:\$|USD|usd)?\s*", asked.budget)
        if match is None:
            raise PlanError(Problem("TS703", f"{asked.budget!r} is not an amount of money", "--budget", _WHY, "write 20$"))
        budget = float(match[1])
    if asked.deadline is not None:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(m|min|h|d)\s*", asked.deadline)
        if match is None:
            raise PlanError(Problem("TS703", f"{asked.deadline!r} is not a time", "--deadline", _WHY, "write 90m, 4h or 2d"))
        hours = float(match[1]) * {"m": 1 / 60, "min": 1 / 60, "h": 1, "d": 24}[match[2]]
    return Asks(budget, hours, asked.latency_critical)


def print_plan(plan: Plan, folder: Path | None, console: Console) -> None:
    """The plan as tables and sentences, within 80 columns."""
    console.print()
    for line in text.heading(plan):
        console.print(Text(line))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, header in enumerate(text.HEADERS):
        table.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    for row, option in zip(text.cells(plan), plan.options.values(), strict=True):
        style = "bold green" if option.method == plan.recommended else "" if option.fits else "dim"
        table.add_row(*row, style=style)
    console.print(table)
    console.print()
    for line in text.bars(plan):
        console.print(Text(line))
    console.print()
    for option in plan.options.values():
        console.print(Text(text.settings_line(option)))
    console.print()
    for line in text.verdict(plan):
        console.print(Text(line, style="bold" if line.startswith("recommended") else ""))
    console.print()
    for line in text.confidence(plan):
        console.print(Text(line))
    if folder is None:
        console.print("nothing written: --out FOLDER saves plan.json, frontier.svg and recipe.yaml")
    else:
        written = ", ".join(["plan.json", "frontier.svg", *(["recipe.yaml"] if plan.recommended else [])])
        console.print(Text(f"written: {folder}/{written}"))


def _calibrate(
    asked: Request, resolved: ResolvedRecipe, facts: DataFacts, device: Device, gpus: dict[str, Device], errors: Console
) -> None:
    """Measure this machine; raises PlanError if the plan is for a different device."""
    here = this_device(gpus)
    if here.name != device.name:
        what = f"--calibrate measures this machine ({here.name}), but the plan is for {device.name}"
        raise PlanError(Problem("TS703", what, "--calibrate", _WHY, "omit --gpu, or run it on that machine"))
    from tunesmith.planner.calibrate import calibrate

    calibrate(resolved.recipe, facts, device, asked.methods, errors)


def _trace(plan: Plan, asked: Request, console: Console) -> None:
    """Trace the recommended step on FakeTensors of the real modules, and compare it with the closed form."""
    from tunesmith.planner.tracing.traced import trace_option

    method = plan.recommended or asked.methods[-1]
    for line in trace_option(plan, plan.options[method]):
        console.print(line, soft_wrap=True)
