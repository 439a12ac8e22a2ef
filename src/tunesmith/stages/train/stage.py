"""The train stage: the same steps for every objective and method; the loop between them depends on the objective."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from tunesmith.errors import DataError, Problem
from tunesmith.hardware import detect
from tunesmith.hardware.allocators import compact_loading, steady_memory
from tunesmith.hardware.memory import PeakMemory
from tunesmith.io.atomic import read_json, write_json
from tunesmith.io.terminal import make_console
from tunesmith.methods import make_method
from tunesmith.models.load import load_tokenizer
from tunesmith.recipe import OBJECTIVES, Objective, RowKind
from tunesmith.runs import Run, prepared_rows
from tunesmith.stages.train.inputs import train_inputs
from tunesmith.stages.train.kernels import compile_blocks
from tunesmith.stages.train.loops import Work, loop_of
from tunesmith.stages.train.out_of_memory import is_out_of_memory, out_of_memory
from tunesmith.stages.train.progress import TrainProgress
from tunesmith.stages.train.ranks import Ranks, folder_of, join
from tunesmith.stages.train.recorder import Recorder
from tunesmith.stages.train.resume import Earlier, made_of
from tunesmith.stages.train.summary import figures_of, tell_settings, total_parameters


def train(run: Run, console: Console | None = None, *, restart: bool = False) -> dict[str, Any]:
    """Train as the recipe says and return `train/summary.json`; a no-op when data, model and settings are unchanged.

    An interrupted training on the engine resumes bit-exactly from its newest intact savepoint; with `restart` it starts over.
    Started by torchrun, all processes train the same run.

    Raises TrainError when loss or gradients become non-finite (with a folder in `train/incidents`), one row does not fit in
    memory, the loss keeps spiking, a reward or TRL cannot be used, or something has changed since an interrupted training's
    savepoint; RunError when `prepare` has not run, another process works on the run, or the recipe requires a sign-off of the
    data that is missing; StoppedError once SIGINT or SIGTERM has stopped it, with exit code 130 or 143.
    """
    recipe = run.recipe
    model_folder, inputs = train_inputs(run)
    ranks = join(recipe, cpu=detect().device == "cpu")
    if not ranks.agreed(run.is_current("train", inputs)):
        console = (console or make_console(stderr=True)) if ranks.first else make_console(quiet=True)
        keep = OBJECTIVES[recipe.objective].on_engine and not restart and run.was_interrupted("train")
        with folder_of(ranks, run, inputs, keep=keep) as folder:
            try:
                _train(run, model_folder, folder, console, inputs, ranks)
            except Exception as error:
                if is_out_of_memory(error):  # outside a step, such as while the model loads
                    raise out_of_memory(None, None, 0, str(error)) from error
                raise
    summary: dict[str, Any] = read_json(run.path / "train" / "summary.json")
    return summary


def _train(run: Run, model_folder: Path, folder: Path, console: Console, inputs: Mapping[str, str], ranks: Ranks) -> None:
    recipe, hardware, objective = run.recipe, detect(), OBJECTIVES[run.recipe.objective]
    earlier = Earlier(run, folder, console)

    def tell(code: str, message: str, **facts: Any) -> None:
        run.event(folder, code, message, **facts)

    loop = loop_of(objective)(run, _rows(run, objective), _tokenizer(run, model_folder))
    settings = loop.settle(hardware)
    tell_settings(run, settings, hardware, folder)
    earlier.look(made_of(recipe, inputs, settings) | {"processes": ranks.world})
    if hardware.device == "cpu":
        steady_memory()
    meter = PeakMemory()
    set_seed(settings.seed)
    dtype, rank, alpha = settings.compute_dtype, settings.r, settings.lora_alpha
    method = make_method(recipe, model_folder, compute_dtype=dtype, r=rank, lora_alpha=alpha)
    with compact_loading() if hardware.device == "cpu" else nullcontext():
        model = loop.build(method)
    compile_blocks(settings, model, tell)
    sizes = {"trainable_parameters": method.trainable_parameters(model), "total_parameters": total_parameters(model)}
    meter.reset()
    with tempfile.TemporaryDirectory() as scratch:
        seconds_before = loop.before(Work(method, model, settings, folder, Path(scratch), console, tell, ranks, earlier))
        recorder = Recorder(folder / "metrics.jsonl", settings.max_steps, earlier.begin())
        with TrainProgress(recipe.method, settings.max_steps, console, recorder.history) as progress:
            recorder.on_step.append(progress.step)
            loop.train(recorder)
        peak = meter.peak_bytes()
        checkpoint = loop.save()
    if not ranks.first:
        return
    summary = {
        "method": recipe.method,
        "objective": recipe.objective,
        "checkpoint": checkpoint.relative_to(run.path).as_posix(),
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
        **sizes,
        "peak_memory_bytes": peak,
    }
    earlier.savepoints.clear()
    write_json(folder / "summary.json", summary | figures_of(recorder.history, seconds_before) | loop.facts())


#: A column that only one kind of rows has; conversations and documents have none.
_COLUMNS: Mapping[str, RowKind] = {"rejected_input_ids": "pair", "label": "judged", "prompt_ids": "prompt"}


def _rows(run: Run, objective: Objective) -> Any:
    """The rows to train on. Raises DataError if there are none, or they were prepared for another objective."""
    rows = prepared_rows(run, "train")
    found = next((kind for column, kind in _COLUMNS.items() if column in rows.column_names), None)
    if found != (objective.rows if objective.rows in _COLUMNS.values() else None):
        why = "what a row's columns mean depends on the objective"
        what = f"the rows were not prepared for objective: {objective.name}"
        raise DataError(Problem("TS113", what, "data/train.arrow", why, "run `tunesmith prepare` again"))
    if len(rows) == 0:
        why = "there is nothing to train on"
        raise DataError(Problem("TS109", "no train rows", str(run.path / "data"), why, "lower data.heldout"))
    return rows


def _tokenizer(run: Run, model_folder: Path) -> Any:
    """The model's tokenizer, with the template that rendered the rows; raw text has none."""
    tokenizer = load_tokenizer(model_folder)
    template = run.path / "data" / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
