"""The train stage: one engine for every method."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from tunesmith.errors import DataError, Problem
from tunesmith.hardware import Hardware, detect
from tunesmith.hardware.memory import PeakMemory, keep_freed_memory
from tunesmith.io.atomic import commit_folder, read_json, write_json
from tunesmith.methods import METHODS, make_method
from tunesmith.methods.settings import Settings, settle
from tunesmith.models.load import load_tokenizer, locate, model_digest
from tunesmith.packing.batch import Collator, PaddedCollator, choose_collator
from tunesmith.packing.loss import use_tree_attention
from tunesmith.packing.noise import EmbeddingNoise
from tunesmith.packing.tree import Limits
from tunesmith.runs import Run
from tunesmith.stages.train.engine import Engine, StepMetrics, training_arguments
from tunesmith.stages.train.objective import make_objective
from tunesmith.stages.train.progress import TrainProgress


def train(run: Run, console: Console | None = None) -> dict[str, Any]:
    """Train as the recipe says and return `train/summary.json`; a no-op when data, model and settings are unchanged.

    Raises TrainError when loss or gradients stop being finite; RunError when `prepare` has not run.
    """
    recipe = run.recipe
    model_folder = locate(recipe.model, recipe.revision)
    inputs = {
        "recipe": recipe.section_digest("model", "revision", "method", "seed", "lora", "train", "objective", "dpo"),
        "data": run.outputs_digest("prepare"),
        "model": model_digest(model_folder),
    }
    if not run.is_current("train", inputs):
        with run.perform("train", "train", inputs, live=True) as folder:
            _train(run, model_folder, folder, console or Console(stderr=True))
    summary: dict[str, Any] = read_json(run.path / "train" / "summary.json")
    return summary


def _train(run: Run, model_folder: Path, folder: Path, console: Console) -> None:
    recipe, hardware = run.recipe, detect()
    objective = make_objective(recipe)
    rows = objective.checked(Dataset.from_file(str(run.path / "data" / "train.arrow")))
    if len(rows) == 0:
        why = "training over nothing changes nothing"
        raise DataError(Problem("TS109", "no train rows", str(run.path / "data"), why, "lower data.heldout"))
    settings = _settings(run, len(rows), hardware, folder)
    if hardware.device == "cpu":
        keep_freed_memory()
    meter = PeakMemory()
    set_seed(recipe.seed)
    dtype, rank, alpha = settings.compute_dtype, settings.r, settings.lora_alpha
    method = make_method(recipe, model_folder, compute_dtype=dtype, r=rank, lora_alpha=alpha)
    model = method.build()
    collator = _collator(run, model, load_tokenizer(model_folder).pad_token_id, objective.longest(rows), folder)
    use_tree_attention(model, on=not isinstance(collator, PaddedCollator))
    batches = objective.batches(collator, Limits(settings.per_device_max_tokens, settings.per_device_train_batch_size))
    if recipe.train.neftune_noise_alpha is not None:
        EmbeddingNoise(model, recipe.train.neftune_noise_alpha)
    meter.reset()
    rows, seconds_before = objective.before(model, rows, batches, folder, console)
    with tempfile.TemporaryDirectory() as scratch, TrainProgress(recipe.method, settings.max_steps, console) as progress:
        engine = Engine(
            objective,
            model,
            training_arguments(recipe, settings, Path(scratch), cpu=hardware.device == "cpu"),
            recipe.train,
            rows,
            batches,
            metrics_path=folder / "metrics.jsonl",
            on_step=progress.step,
        )
        engine.train()
    peak = meter.peak_bytes()
    engine.finish()
    checkpoint = folder / "checkpoints" / f"step-{settings.max_steps:06d}"
    with commit_folder(checkpoint) as target:
        method.save(model, target)
    summary = {
        "method": recipe.method,
        "checkpoint": checkpoint.relative_to(run.path).as_posix(),
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
        "trainable_parameters": method.trainable_parameters(model),
        "total_parameters": total_parameters(model),
        "peak_memory_bytes": peak,
    }
    write_json(folder / "summary.json", summary | _figures(engine.history, seconds_before))


def _settings(run: Run, rows: int, hardware: Hardware, folder: Path) -> Settings:
    """The settled settings, written to settings.json, with an event for each value that the recipe left open."""
    recipe = run.recipe
    settings = settle(recipe, rows, METHODS[recipe.method].default_learning_rate, hardware)
    write_json(folder / "settings.json", {**settings.as_dict(), "hardware": hardware.as_dict()})
    for name, reason in settings.reasons.items():
        if reason != "recipe":
            value = getattr(settings, name)
            run.event(folder, "setting", f"{name} = {value} ({reason})", name=name, value=value, reason=reason)
    if hardware.accelerators > 1:
        run.event(folder, "one-device", f"one of {hardware.accelerators} GPUs is used")
    return settings


def _figures(history: Sequence[StepMetrics], seconds_before: float) -> dict[str, Any]:
    """Speed and loss over all steps; the first step also allocates, so the median leaves it out.

    `seconds` is the whole training, with what the objective took before the first step.
    """
    seconds = [step.seconds for step in history]
    return {
        "steps": len(seconds),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "tokens_per_second": sum(step.tokens for step in history) / sum(seconds),
        "computed_tokens_per_second": sum(step.computed_tokens for step in history) / sum(seconds),
        "seconds_before_first_step": seconds_before,
        "seconds": seconds_before + sum(seconds),
        "first_loss": history[0].loss,
        "last_loss": history[-1].loss,
    }


def _collator(run: Run, model: Any, pad_id: int | None, longest: int, folder: Path) -> Collator:
    """How rows become batches; an event where a tree was asked for and cannot be."""
    if not run.recipe.train.packing:
        return PaddedCollator(pad_id)
    collator, reason = choose_collator(model.config, pad_id, longest)
    if reason is not None:
        run.event(folder, "packing-off", f"rows are padded, those of like length together: {reason}", reason=reason)
    return collator


def total_parameters(model: Any) -> int:
    """All parameters of the model; a 4-bit weight counts the parameters that it stands for."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total
