"""The command line: one thin function for each stage; parse, call, render, exit code.

Exit codes: 0 done, 2 the user can mend it (a readable error), 130 and 143 stopped by SIGINT and SIGTERM. Nothing here imports
torch: a stage does.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith import __version__
from tunesmith.demodata import MAX_ROWS, TEST_ROWS
from tunesmith.errors import ERRORS_TO, EndedError, Problem, TunesmithError, error_as_json
from tunesmith.hardware.allocators import grow_segments, keep_few_products
from tunesmith.io.terminal import make_console, plain

if TYPE_CHECKING:
    from tunesmith.recipe import Method, ResolvedRecipe

app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Give it a [bold]model[/], your [bold]data[/] and your [bold]hardware[/]. It trains with full fine-tuning, LoRA or "
    "QLoRA, proves that the merged model is the one that was trained, and shows which way won.\n\n"
    "Start with [bold cyan]tunesmith demo[/]: a real model, three ways, on a laptop CPU.",
)

_BEGIN, _STAGES = "Begin here", "One stage at a time"

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `prepare` or `run` made.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="FOLDER", help="The run folder; default runs/<time>-<model>-<method>-<digest>.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, as train.max_steps=10.")
]
Methods = Annotated[
    str | None, typer.Option(metavar="LIST", help="Which of full, lora, qlora, separated by commas; default all.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(f"tunesmith {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_BEGIN)
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the data, the runs and the report go.")] = Path(
        "runs/demo"
    ),
    methods: Methods = None,
    rows: Annotated[int, typer.Option(min=40, help="Rows to train on; fewer is faster and worse.")] = MAX_ROWS,
    test_rows: Annotated[int, typer.Option(min=4, help="Rows to score on.")] = TEST_ROWS,
) -> None:
    """Adapt a real chat model to a support-desk task three ways, and see which won."""
    from tunesmith.demodata import write_input
    from tunesmith.recipe import load_recipe

    recipe_path = write_input(out / "input", max_rows=rows, test_rows=test_rows)
    _compare_methods(load_recipe(recipe_path), out, methods)


@app.command(rich_help_panel=_BEGIN)
def run(
    recipe: RecipePath,
    folder: RunOption = None,
    methods: Annotated[
        str | None, typer.Option(metavar="LIST", help="Train several of full, lora, qlora and compare them.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """All stages of a recipe: prepare, plan, train, export, evaluate (and compare)."""
    from tunesmith import pipeline
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import default_name

    resolved = load_recipe(recipe, overrides or ())
    if methods is not None:
        _compare_methods(resolved, folder or Path("runs") / default_name(resolved.recipe), methods)
    else:
        resolved = pipeline.settle_method(resolved, _err())
        target = folder or Path("runs") / default_name(resolved.recipe)
        pipeline.run(resolved, target, _err())
        print(target)


@app.command(rich_help_panel=_BEGIN)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a model folder, or a recipe (.yaml).")],
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="24GB, H100, 8xH100, cpu; default: what this machine has.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to train on; their lengths are read.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to train on, where no data is given.")] = 10_000,
    length: Annotated[int, typer.Option(help="Tokens of a row, where no data is given.")] = 2048,
    methods: Methods = None,
    budget: Annotated[str | None, typer.Option(metavar="DOLLARS", help="Most money, as 20$.")] = None,
    deadline: Annotated[str | None, typer.Option(metavar="TIME", help="Most time, as 4h, 90m or 2d.")] = None,
    latency_critical: Annotated[bool, typer.Option("--latency-critical", help="Answers must come fast when served.")] = False,
    gpus: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file with more cards, or other prices.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where plan.json, frontier.svg and recipe.yaml go.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of the table.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine on the model's blocks first.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also trace the recommended step on the real modules.")] = False,
    overrides: Overrides = None,
) -> None:
    """Which method fits, what it takes in memory, time and money, and why: before any of it is spent."""
    from tunesmith import planning

    asked = planning.Request(
        model, gpu, data, rows, length, _method_names(methods), budget, deadline, latency_critical, gpus, overrides or []
    )
    planning.show(asked, out, as_json=as_json, calibrate=calibrate, trace=trace, errors=_err())


@app.command(rich_help_panel=_STAGES)
def prepare(recipe: RecipePath, folder: RunOption = None, overrides: Overrides = None) -> None:
    """Rows to token ids with a loss mask; every row accounted for. Prints the run folder."""
    from tunesmith.models.load import locate
    from tunesmith.pipeline import prepare_shown, settle_method
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import create_run, default_name
    from tunesmith.stages.prepare import without_torch

    resolved = settle_method(load_recipe(recipe, overrides or ()), _err())
    locate(resolved.recipe.model, resolved.recipe.revision)  # may convert a model, with torch
    without_torch()
    this = create_run(resolved, folder or Path("runs") / default_name(resolved.recipe))
    prepare_shown(this, _err())
    print(this.path)


@app.command(rich_help_panel=_STAGES)
def augment(recipe: RecipePath, overrides: Overrides = None) -> None:
    """More rows: paraphrases of the train rows by the endpoint that the recipe names, each checked."""
    from tunesmith.recipe import load_recipe
    from tunesmith.stages.augment import augment as stage

    resolved = load_recipe(recipe, overrides or ())
    summary = stage(resolved.recipe, _err())
    _facts(summary, "parents", "requests", "from_cache", "tokens", "rows")
    for reason, count in summary["refused"].items():
        print(f"{'refused':>22}  {count} {reason}")
    print(resolved.recipe.augment.out)


@app.command(rich_help_panel=_STAGES)
def review(
    source: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A prepared run folder, or a recipe to prepare first.")],
    folder: RunOption = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who signs off; default your user name.")] = None,
    rows: Annotated[int, typer.Option(min=200, help="Rows to look at (all, where there are fewer).")] = 200,
) -> None:
    """Look at a sample of the prepared rows, decide on each with one key, and sign the data off."""
    import getpass

    from tunesmith.pipeline import prepare_shown, settle_method
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import create_run, default_name, open_run
    from tunesmith.stages.review import Review
    from tunesmith.stages.review.terminal import review as screen

    if source.is_file():
        resolved = settle_method(load_recipe(source), _err())
        this = create_run(resolved, folder or Path("runs") / default_name(resolved.recipe))
        prepare_shown(this, _err())
    else:
        this = open_run(source)
    screen(Review(this, rows), by or getpass.getuser(), make_console())
    print(this.path)


@app.command(rich_help_panel=_STAGES)
def train(
    run: RunPath,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again where a training was interrupted.")] = False,
) -> None:
    """Train as the run's recipe says, or go on where it was interrupted; tell how far off the plan was."""
    from tunesmith.pipeline import score_shown
    from tunesmith.runs import open_run
    from tunesmith.stages.train import train as stage

    this = open_run(run)
    summary = stage(this, _err(), restart=restart)
    score_shown(this, _err())
    _facts(summary, "steps", "trainable_parameters", "seconds_per_step", "tokens_per_second", "last_loss", "checkpoint")


@app.command(rich_help_panel=_STAGES)
def export(run: RunPath) -> None:
    """Merge into one bf16 model folder, opened again and compared with what was trained."""
    from tunesmith.runs import open_run
    from tunesmith.stages.export import export as stage

    this = open_run(run)
    proof = stage(this)
    names = ("mean_kl", "loss_difference", "top1_agreement", "tokens", "max_reward_difference", "reward_accuracy")
    _facts(proof, *(name for name in names if name in proof))
    print(this.path / "export" / this.recipe.export.name)


@app.command(rich_help_panel=_STAGES)
def evaluate(
    run: RunPath,
    base: Annotated[bool, typer.Option("--base", help="Score the untouched base model instead of the export.")] = False,
    model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Score another model folder.")] = None,
) -> None:
    """Score the task on rows that were not trained on."""
    from tunesmith.runs import open_run
    from tunesmith.stages.evaluate.stage import evaluate as stage
    from tunesmith.stages.evaluate.stage import evaluate_base

    this = open_run(run)
    results = evaluate_base(this, _err()) if base else stage(this, model, _err())
    names = ("task_score", "perplexity", "json_parse_rate", "schema_valid_rate", "macro_f1", "eval_loss", "rows")
    _facts(results, *(name for name in names if name in results))
    if "mmlu" in results:
        _facts({f"mmlu_{key}": value for key, value in results["mmlu"].items()}, "mmlu_accuracy", "mmlu_questions")


@app.command(rich_help_panel=_STAGES)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders that are evaluated.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where compare.json and report.html go.")] = Path("runs/compare"),
) -> None:
    """One table of several runs, and the same as a page."""
    from tunesmith.runs import open_run
    from tunesmith.stages.compare import compare as stage

    _show_table(stage([open_run(path) for path in runs], out), out)


def _method_names(methods: str | None) -> list[Method]:
    """The methods of a list with commas, all without one; raises TunesmithError for an unknown one, and for one named twice."""
    from tunesmith.pipeline import ALL_METHODS

    if methods is None:
        return list(ALL_METHODS)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in ALL_METHODS]
    why, fix = "nothing could be trained", f"use {', '.join(ALL_METHODS)}"
    if unknown or not names:
        raise TunesmithError(Problem("TS020", f"unknown method {', '.join(unknown) or '(none)'}", "--methods", why, fix))
    if len(set(names)) < len(names):
        why, fix = "it would be trained and compared with itself", "name each once"
        raise TunesmithError(Problem("TS020", f"a method stands twice: {methods}", "--methods", why, fix))
    return [method for method in names if method in ALL_METHODS]


def _compare_methods(resolved: ResolvedRecipe, target: Path, methods: str | None) -> None:
    from tunesmith import pipeline

    _show_table(pipeline.run_methods(resolved, target, _method_names(methods), _err()), target / "compare")


def _show_table(table: dict[str, Any], folder: Path) -> None:
    from tunesmith.stages.compare.forgetting import FORGETTING_HEADERS, forgetting_cells, forgetting_verdict
    from tunesmith.stages.compare.text import HEADERS, cells, verdict

    console = make_console()
    _print_table(console, HEADERS, cells(table["rows"]))
    console.print(Text(verdict(table["rows"])))
    if forgetting := forgetting_cells(table["rows"]):
        _print_table(console, FORGETTING_HEADERS, forgetting)
        console.print(Text(forgetting_verdict(table["rows"]) or ""))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _print_table(console: Console, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table with a blank line before and after it, the first column to the left, numbers to the right."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, header in enumerate(headers):
        shown.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    console.print()
    console.print(shown)
    console.print()


def _facts(values: dict[str, Any], *names: str) -> None:
    """Print chosen values, one a line, as `name value`."""
    for name in names:
        value = values[name]
        print(plain(f"{name:>22}  {f'{value:.4g}' if isinstance(value, float) else value}"))


def _err() -> Console:
    """Progress goes to standard error, results to standard output."""
    return make_console(stderr=True)


def show_problems(problems: Sequence[Problem]) -> None:
    """Print problems to standard error: what and where first, then why it matters and what to do."""
    console = _err()
    for problem in problems:
        console.print(Text.assemble((f"error {problem.code} {problem.name}", "bold red"), f"  {problem.where}"), soft_wrap=True)
        for label, text in (("", problem.what), ("why  ", problem.why), ("fix  ", problem.fix)):
            console.print(Text.assemble("  ", (label, "bold"), text), soft_wrap=True)


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    # bitsandbytes asks for an optional package of faster CPU kernels each time it loads without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    grow_segments()
    keep_few_products()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal's encoding lacks
    told_to = os.environ.pop(ERRORS_TO, None)
    try:
        app()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except EndedError as error:
        code = error.exit_code
    except TunesmithError as error:
        if told_to is None:
            show_problems(error.problems)
        else:
            Path(told_to).write_text(json.dumps(error_as_json(error)), encoding="utf-8")
        code = 2
    except OSError as error:
        code = _told(error)
    except KeyboardInterrupt:
        _err().print("interrupted", style="bold red")
        code = 130
    else:
        code = 0
    sys.exit(_flushed(code))


#: What an operating system refuses that is no fault of the program: space, rights, a device.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG}


def _told(error: OSError) -> int:
    """The exit code of what the operating system has refused, which is told; another error is raised again."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE  # as the shell has it: who read has left
    if error.errno not in _REFUSED:
        raise error
    where = str(error.filename or "standard output")
    why, fix = "what was to be read or written there is missing", "make room, change the rights, or name another place"
    show_problems([Problem("TS013", str(error.strerror), where, why, fix)])
    return 2


def _flushed(code: int) -> int:
    """The exit code once all is written, of which Python would complain later."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _told(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in it is lost, and said to be
    return code
