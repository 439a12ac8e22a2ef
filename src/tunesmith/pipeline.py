"""Several stages in order: the only module, beside the command line, that knows more than one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from tunesmith.errors import StageFailedError
from tunesmith.io.atomic import read_json
from tunesmith.recipe import Method, Origin, ResolvedRecipe
from tunesmith.runs import Run, create_run

ALL_METHODS: tuple[Method, ...] = get_args(Method)


def with_method(resolved: ResolvedRecipe, method: str) -> ResolvedRecipe:
    """The same recipe with another method."""
    recipe = type(resolved.recipe).model_validate({**resolved.recipe.model_dump(), "method": method})
    origins: dict[str, Origin] = {**resolved.origins, "method": "override"}
    return ResolvedRecipe(recipe=recipe, origins=origins)


def run(resolved: ResolvedRecipe, path: Path, console: Console) -> Run:
    """prepare, train, export and evaluate in the run folder `path`; stages that are up to date do nothing."""
    this = create_run(resolved, path)
    prepare_shown(this, console)
    _tune(this, console)
    return this


def run_methods(resolved: ResolvedRecipe, folder: Path, methods: Sequence[str], console: Console) -> dict[str, Any]:
    """One run for each method in `folder`/<method>, the base model scored once, and their comparison."""
    from tunesmith.stages.compare import compare
    from tunesmith.stages.evaluate.stage import evaluate_base

    runs: list[Run] = []
    for method in methods:
        this = create_run(with_method(resolved, method), folder / method)
        prepare_shown(this, console)
        if not runs:
            _say(console, "evaluate", "the base model, for comparison")
            evaluate_base(this, console)
        _tune(this, console)
        runs.append(this)
    return compare(runs, folder / "compare")


def _tune(this: Run, console: Console) -> None:
    """What comes after `prepare`: train, export and evaluate."""
    train_apart(this, console)
    _export(this, console)
    _evaluate(this, console)


def prepare_shown(this: Run, console: Console) -> None:
    """`prepare`, with its ledger printed."""
    from tunesmith.stages.prepare import prepare

    ledger = prepare(this)
    reasons = ", ".join(f"{count} {reason}" for reason, count in ledger["reasons"].items())
    _say(
        console,
        "prepare",
        f"{ledger['rows_in']} rows in = {ledger['rows_train']} train + {ledger['rows_heldout']} held out "
        f"+ {ledger['rows_rejected']} rejected" + (f" ({reasons})" if reasons else ""),
    )


def train_apart(this: Run, console: Console) -> None:
    """`train` in a process of its own: its memory is all given back, and its peak is its own. Raises StageFailedError.

    Its progress and errors go to this process's standard error; its facts are told here in a line.
    """
    command = [sys.executable, "-m", "tunesmith", "train", str(this.path)]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise StageFailedError(done.returncode)
    facts = read_json(this.path / "train" / "summary.json")
    _say(
        console,
        "train",
        f"{this.recipe.method}: {facts['steps']} steps of {facts['seconds_per_step']:.2f} s, loss {facts['first_loss']:.3f} to "
        f"{facts['last_loss']:.3f}, {facts['peak_memory_bytes'] / 2**30:.2f} GiB at peak",
    )


def _export(this: Run, console: Console) -> None:
    from tunesmith.stages.export import export

    proof = export(this)
    _say(
        console,
        "export",
        f"export/{this.recipe.export.name}, equal to the checkpoint: KL {proof['mean_kl']:.1e} nats a token, "
        f"{100 * proof['top1_agreement']:.1f} % same first choice",
    )


def _evaluate(this: Run, console: Console) -> None:
    from tunesmith.stages.evaluate import evaluate

    results = evaluate(this, console=console)
    loss = "" if results["eval_loss"] is None else f", eval loss {results['eval_loss']:.3f}"
    _say(console, "evaluate", f"task score {100 * results['task_score']:.1f} % on {results['rows']} rows{loss}")


def _say(console: Console, stage: str, text: str) -> None:
    console.print(f"[bold cyan]{stage:>8}[/]  {text}", highlight=False)
