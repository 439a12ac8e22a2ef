"""The commands: one thin function each that parses, calls a stage and renders its result. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import __version__
from tunesmith.cli.render import print_facts, show_table, stderr
from tunesmith.demo import MAX_ROWS, TEST_ROWS
from tunesmith.errors import Problem, TunesmithError
from tunesmith.io.terminal import make_console

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
    "QLoRA, verifies that the merged model matches the trained one, and shows which method won.\n\n"
    "Start with [bold cyan]tunesmith demo[/]: a real model, three methods, on a laptop CPU.",
)

_BEGIN, _STAGES = "Start here", "One stage at a time"

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder created by `prepare` or `run`.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="FOLDER", help="The run folder; default runs/<time>-<model>-<method>-<digest>.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as train.max_steps=10.")
]
Methods = Annotated[str | None, typer.Option(metavar="LIST", help="Any of full, lora, qlora, comma-separated; default: all.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"tunesmith {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_BEGIN)
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder for data, runs and report.")] = Path("runs/demo"),
    methods: Methods = None,
    rows: Annotated[int, typer.Option(min=40, help="Rows to train on; fewer are faster but score worse.")] = MAX_ROWS,
    test_rows: Annotated[int, typer.Option(min=4, help="Rows to score on.")] = TEST_ROWS,
) -> None:
    """Adapt a real chat model to a support-desk task with three methods, and see which won."""
    from tunesmith.demo import write_input
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
    """Run all stages of a recipe: prepare, plan, train, export, evaluate (and compare)."""
    from tunesmith import pipeline
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import default_name

    resolved = load_recipe(recipe, overrides or ())
    if methods is not None:
        _compare_methods(resolved, folder or Path("runs") / default_name(resolved.recipe), methods)
    else:
        resolved = pipeline.settle_method(resolved, stderr())
        target = folder or Path("runs") / default_name(resolved.recipe)
        pipeline.run(resolved, target, stderr())
        print(target)


@app.command(rich_help_panel=_BEGIN)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a model folder, or a recipe (.yaml).")],
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="24GB, H100, 8xH100, cpu; default: this machine.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to train on; read for their lengths.")] = None,
    rows: Annotated[int, typer.Option(help="Number of train rows, if no data is given.")] = 10_000,
    length: Annotated[int, typer.Option(help="Tokens per row, if no data is given.")] = 2048,
    methods: Methods = None,
    budget: Annotated[str | None, typer.Option(metavar="DOLLARS", help="Maximum cost, such as 20$.")] = None,
    deadline: Annotated[str | None, typer.Option(metavar="TIME", help="Maximum time, such as 4h, 90m or 2d.")] = None,
    latency_critical: Annotated[bool, typer.Option("--latency-critical", help="Serving needs low latency.")] = False,
    gpus: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file with more GPUs or other prices.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Output folder for plan.json, frontier.svg and recipe.yaml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of the table.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Time real training steps on this machine first.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also trace the recommended step on the real modules.")] = False,
    overrides: Overrides = None,
) -> None:
    """Predict memory, time and cost of each method, and recommend one with reasons, before you spend anything."""
    from tunesmith.cli.plan import Request, show

    asked = Request(
        model, gpu, data, rows, length, _method_names(methods), budget, deadline, latency_critical, gpus, overrides or []
    )
    show(asked, out, as_json=as_json, calibrate=calibrate, trace=trace, errors=stderr())


@app.command(rich_help_panel=_STAGES)
def prepare(recipe: RecipePath, folder: RunOption = None, overrides: Overrides = None) -> None:
    """Turn rows into token ids with a loss mask; every row is accounted for. Prints the run folder."""
    from tunesmith.models.load import locate
    from tunesmith.pipeline import prepare_shown, settle_method
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import create_run, default_name
    from tunesmith.stages.prepare import without_torch

    resolved = settle_method(load_recipe(recipe, overrides or ()), stderr())
    locate(resolved.recipe.model, resolved.recipe.revision)  # may convert a model, with torch
    without_torch()
    this = create_run(resolved, folder or Path("runs") / default_name(resolved.recipe))
    prepare_shown(this, stderr())
    print(this.path)


@app.command(rich_help_panel=_STAGES)
def augment(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Generate more rows: paraphrases of the train rows from the recipe's endpoint, each one checked."""
    from tunesmith.recipe import load_recipe
    from tunesmith.stages.augment import augment as stage

    resolved = load_recipe(recipe, overrides or ())
    summary = stage(resolved.recipe, stderr())
    print_facts(summary, "parents", "requests", "from_cache", "tokens", "rows")
    for reason, count in summary["refused"].items():
        print(f"{'refused':>22}  {count} {reason}")
    print(resolved.recipe.augment.out)


@app.command(rich_help_panel=_STAGES)
def review(
    source: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A prepared run folder, or a recipe to prepare first.")],
    folder: RunOption = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who signs off; default: your user name.")] = None,
    rows: Annotated[int, typer.Option(min=200, help="Rows to look at (all, if there are fewer).")] = 200,
) -> None:
    """Review a sample of the prepared rows, decide on each with one key, and sign off the data."""
    import getpass

    from tunesmith.pipeline import prepare_shown, settle_method
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import create_run, default_name, open_run
    from tunesmith.stages.review import Review
    from tunesmith.stages.review import review as screen

    if source.is_file():
        resolved = settle_method(load_recipe(source), stderr())
        this = create_run(resolved, folder or Path("runs") / default_name(resolved.recipe))
        prepare_shown(this, stderr())
    else:
        this = open_run(source)
    screen(Review(this, rows), by or getpass.getuser(), make_console())
    print(this.path)


@app.command(rich_help_panel=_STAGES)
def train(
    run: RunPath,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of resuming interrupted training.")] = False,
) -> None:
    """Train as the run's recipe says, or resume interrupted training; report the plan's error."""
    from tunesmith.pipeline import score_shown
    from tunesmith.runs import open_run
    from tunesmith.stages.train import train as stage

    this = open_run(run)
    summary = stage(this, stderr(), restart=restart)
    score_shown(this, stderr())
    print_facts(summary, "steps", "trainable_parameters", "seconds_per_step", "tokens_per_second", "last_loss", "checkpoint")


@app.command(rich_help_panel=_STAGES)
def export(run: RunPath) -> None:
    """Merge into one bf16 model folder, reload it and compare it with the trained model."""
    from tunesmith.runs import open_run
    from tunesmith.stages.export import export as stage

    this = open_run(run)
    proof = stage(this)
    names = ("mean_kl", "loss_difference", "top1_agreement", "tokens", "max_reward_difference", "reward_accuracy")
    print_facts(proof, *(name for name in names if name in proof))
    print(this.path / "export" / this.recipe.export.name)


@app.command(rich_help_panel=_STAGES)
def evaluate(
    run: RunPath,
    base: Annotated[bool, typer.Option("--base", help="Score the untouched base model instead of the export.")] = False,
    model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Score another model folder.")] = None,
) -> None:
    """Score the task on rows that were not trained on."""
    from tunesmith.runs import open_run
    from tunesmith.stages.evaluate import evaluate as stage
    from tunesmith.stages.evaluate import evaluate_base

    this = open_run(run)
    results = evaluate_base(this, stderr()) if base else stage(this, model, stderr())
    names = ("task_score", "perplexity", "json_parse_rate", "schema_valid_rate", "macro_f1", "eval_loss", "rows")
    print_facts(results, *(name for name in names if name in results))
    if "mmlu" in results:
        print_facts({f"mmlu_{key}": value for key, value in results["mmlu"].items()}, "mmlu_accuracy", "mmlu_questions")


@app.command(rich_help_panel=_STAGES)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Evaluated run folders.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For compare.json and report.html.")] = Path("runs/compare"),
) -> None:
    """Compare several runs in one table and an HTML report."""
    from tunesmith.runs import open_run
    from tunesmith.stages.compare import compare as stage

    show_table(stage([open_run(path) for path in runs], out), out)


def _method_names(methods: str | None) -> list[Method]:
    """The methods of a comma-separated list, or all if None; raises TunesmithError for unknown or repeated methods."""
    from tunesmith.pipeline import ALL_METHODS

    if methods is None:
        return list(ALL_METHODS)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in ALL_METHODS]
    why, fix = "nothing could be trained", f"use {', '.join(ALL_METHODS)}"
    if unknown or not names:
        raise TunesmithError(Problem("TS020", f"unknown method {', '.join(unknown) or '(none)'}", "--methods", why, fix))
    if len(set(names)) < len(names):
        why, fix = "it would be trained and compared with itself", "list each method once"
        raise TunesmithError(Problem("TS020", f"a method is listed twice: {methods}", "--methods", why, fix))
    return [method for method in names if method in ALL_METHODS]


def _compare_methods(resolved: ResolvedRecipe, target: Path, methods: str | None) -> None:
    from tunesmith import pipeline

    show_table(pipeline.run_methods(resolved, target, _method_names(methods), stderr()), target / "compare")
