"""Runs stages in order: the only module besides the command line that knows more than one stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from tunesmith.errors import (
    ERRORS_TO,
    ExportError,
    ModelError,
    PlanError,
    RecipeError,
    StageFailedError,
    StoppedError,
    error_of_json,
)
from tunesmith.io.atomic import check_replaceable, read_json
from tunesmith.io.signals import handling
from tunesmith.recipe import OBJECTIVES, Method, Origin, Recipe, ResolvedRecipe, export_problems, hardware_problems
from tunesmith.runs import Run, create_run

#: Exit codes of training that a signal stopped between two steps.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

ALL_METHODS: tuple[Method, ...] = get_args(Method)


def with_method(resolved: ResolvedRecipe, method: str) -> ResolvedRecipe:
    """The same recipe with another method."""
    recipe = type(resolved.recipe).model_validate({**resolved.recipe.model_dump(), "method": method})
    origins: dict[str, Origin] = {**resolved.origins, "method": "override"}
    return ResolvedRecipe(recipe=recipe, origins=origins)


def settle_method(resolved: ResolvedRecipe, console: Console) -> ResolvedRecipe:
    """The recipe with `method: auto` replaced by what the plan for this machine recommends, including settings.

    Raises PlanError if nothing fits.
    """
    if resolved.recipe.method != "auto":
        return resolved
    from tunesmith.hardware.catalogue import read_gpus, this_device
    from tunesmith.planner.datafacts import read_facts
    from tunesmith.planner.decide import CHOICES
    from tunesmith.planner.plan import encoder_for, fixed_keys, plan_for, with_settings

    recipe, gpus = resolved.recipe, read_gpus()
    facts = read_facts(recipe.data, encoder_for(recipe.model), recipe.objective)
    made = plan_for(recipe, facts, this_device(gpus), gpus, fixed=fixed_keys(resolved))
    if made.recommended is None:
        raise PlanError(made.problem())
    why = next(reason.text for reason in made.reasons if reason.rule in CHOICES)
    _say(console, "plan", f"method {made.recommended}: {why}")
    return with_settings(resolved, made.options[made.recommended])


def run(resolved: ResolvedRecipe, path: Path, console: Console) -> Run:
    """prepare, plan, train, export and evaluate in the run folder `path`; stages that are up to date do nothing.

    Before anything runs, raises RecipeError for a key that this machine does not support, and ExportError for what could be
    trained but not exported.
    """
    _check(resolved.recipe)
    this = create_run(settle_method(resolved, console), path)
    prepare_shown(this, console)
    _tune(this, console)
    return this


def _check(recipe: Recipe) -> None:
    """Check in advance what would otherwise fail hours into the run."""
    from tunesmith.hardware.catalogue import surely_no_gpu

    if problems := hardware_problems(recipe.train, cpu=surely_no_gpu()):
        raise RecipeError(problems)
    if problems := export_problems(recipe):
        raise ExportError(problems)


def run_methods(resolved: ResolvedRecipe, folder: Path, methods: Sequence[str], console: Console) -> dict[str, Any]:
    """One run per method in `folder`/<method>, the base model scored once, and the comparison table."""
    from tunesmith.stages.compare import COMPARISON, compare
    from tunesmith.stages.evaluate import evaluate_base

    for method in methods:
        _check(with_method(resolved, method).recipe)
    check_replaceable(folder / "compare", COMPARISON)  # before hours of training, not after
    runs = [create_run(with_method(resolved, method), folder / method) for method in methods]
    for this in runs:
        prepare_shown(this, console)
        if this is runs[0]:
            _say(console, "evaluate", "the base model, for comparison")
            evaluate_base(this, console)
            _measure_machine(this, methods, console)
        _tune(this, console)
    return compare(runs, folder / "compare")


def _measure_machine(this: Run, methods: Sequence[str], console: Console) -> None:
    """Calibrate each method that this machine has no measurement for, so that every planned time rests on one."""
    from tunesmith.hardware.calibration import Bound, read_entries, time_correction
    from tunesmith.hardware.catalogue import read_gpus, this_device
    from tunesmith.planner.calibrate import calibrate
    from tunesmith.planner.datafacts import prepared_facts, refuse_unplanned
    from tunesmith.planner.plan import METHODS, calibration_file

    recipe, device, entries = this.recipe, this_device(read_gpus()), read_entries(calibration_file())
    dtype = device.compute_dtype if recipe.train.compute_dtype == "auto" else recipe.train.compute_dtype
    unknown = [
        method
        for method in METHODS
        if method in methods
        and not any(time_correction(entries, device.name, method, dtype, 1, bound).measurements for bound in get_args(Bound))
    ]
    if not unknown:
        return
    try:
        refuse_unplanned(recipe.objective)
        calibrate(recipe, prepared_facts(this.path / "data"), device, unknown, console, free=False)
    except (ModelError, PlanError):
        return  # the plan stage prints the reason


def _tune(this: Run, console: Console) -> None:
    """Run the stages after `prepare`: plan, train, export and evaluate."""
    _plan(this, console)
    train_apart(this, console)
    _export(this, console)
    _evaluate(this, console)


def prepare_shown(this: Run, console: Console) -> None:
    """Run `prepare` and print its ledger."""
    from tunesmith.stages.prepare import prepare

    ledger = prepare(this)
    left = [
        f" + {ledger[count]} {count.removeprefix('rows_')}{_reasons(ledger[reasons])}"
        for count, reasons in (("rows_unused", "unused"), ("rows_rejected", "reasons"))
        if ledger[count] or count == "rows_rejected"
    ]
    added = f" + {ledger['rows_added']} by splitting" if ledger["rows_added"] else ""
    _say(
        console,
        "prepare",
        f"{ledger['rows_in']} rows in{added} = {ledger['rows_train']} train + {ledger['rows_heldout']} held out"
        + "".join(left),
    )


def _reasons(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f" ({reasons})" if reasons else ""


def _plan(this: Run, console: Console) -> None:
    """Plan this run and print the prediction; a model or objective that the planner does not cover trains without one."""
    from tunesmith.stages.plan import plan

    try:
        promise = plan(this)["methods"][0]
    except (ModelError, PlanError) as error:
        _say(console, "plan", f"none: {error.problems[0].what}")
        return
    memory, step = promise["peak_memory_bytes"] / 2**30, promise["seconds_per_step"]
    minutes = promise["hours"] * 60
    _say(console, "plan", f"{promise['method']}: {memory:.2f} GiB at peak, {step:.2f} s/step, {minutes:.1f} min of training")


def score_shown(this: Run, console: Console) -> None:
    """Print one line that compares plan and measurement; nothing for a run without a plan."""
    from tunesmith.stages.plan import score

    scored = score(this)
    if scored is not None:
        memory, step = scored["peak_memory_bytes"], scored["seconds_per_step"]
        _say(
            console,
            "score",
            f"the plan was off by {memory['error_percent']:+.0f} % in memory and {step['error_percent']:+.0f} % in step time",
        )


def train_apart(this: Run, console: Console) -> None:
    """Run `train` in its own process, so that all its memory is returned and its peak memory is measured separately.

    Its progress goes to this process's standard error; its results are printed here in one line. Raises the same errors as
    `train`, and StageFailedError if the process died. A training that is done starts no process.
    """
    from tunesmith.stages.train import is_trained

    if not is_trained(this):
        _train_in_child(this)
    facts = read_json(this.path / "train" / "summary.json")
    _say(
        console,
        "train",
        f"{this.recipe.method}: {facts['steps']} steps of {facts['seconds_per_step']:.2f} s, loss {facts['first_loss']:.3f} to "
        f"{facts['last_loss']:.3f}, {facts['peak_memory_bytes'] / 2**30:.2f} GiB at peak",
    )


def _train_in_child(this: Run) -> None:
    command = [sys.executable, "-P", "-m", "tunesmith", "train", str(this.path)]
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        # In its own session the child gets each signal once, from here; this process waits for how it handles it.
        environment = {**os.environ, ERRORS_TO: str(error_file)}
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=environment)
        with handling(lambda number, _: child.send_signal(number)):
            code = child.wait()
        if error_file.is_file():
            raise error_of_json(read_json(error_file))
    if code in STOPPED:
        raise StoppedError(code)
    if code != 0:
        raise StageFailedError(code if code > 0 else 128 - code)


def _export(this: Run, console: Console) -> None:
    from tunesmith.stages.export import export

    proof = export(this)
    if OBJECTIVES[this.recipe.objective].reward_model:
        apart = proof["max_reward_difference"]
        _say(console, "export", f"export/{this.recipe.export.name}, a reward model; rewards differ by {apart:.1e} at most")
        return
    _say(
        console,
        "export",
        f"export/{this.recipe.export.name}, equal to the checkpoint: KL {proof['mean_kl']:.1e} nats per token, "
        f"{100 * proof['top1_agreement']:.1f} % top-1 agreement",
    )


def _evaluate(this: Run, console: Console) -> None:
    from tunesmith.stages.evaluate import evaluate

    if OBJECTIVES[this.recipe.objective].reward_model:
        _say(console, "evaluate", "skipped: a reward model generates no answers")
        return
    results = evaluate(this, console=console)
    loss = "" if results["eval_loss"] is None else f", eval loss {results['eval_loss']:.3f}"
    mmlu = results.get("mmlu")
    known = "" if mmlu is None else f", MMLU {100 * mmlu['accuracy']:.1f} % on {mmlu['questions']} questions"
    if "perplexity" in results:
        score = f"perplexity {results['perplexity']:.2f}, {100 * results['task_score']:.1f} % top-1 token accuracy,"
    else:
        score = f"task score {100 * results['task_score']:.1f} %"
    _say(console, "evaluate", f"{score} on {results['rows']} rows{loss}{known}")


def _say(console: Console, stage: str, text: str) -> None:
    console.print(Text.assemble((f"{stage:>8}", "bold cyan"), f"  {text}"))
