"""Training of the objectives that do not run on the engine's prefix trees: KTO, ORPO, reward models, GRPO, RLOO and PPO.

The same recipe, methods, optimizer and run files; the loop is TRL's, or for PPO the one in `ppo`.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from tunesmith.errors import DataError, Problem, RecipeError, TrainError
from tunesmith.hardware import Hardware, detect
from tunesmith.hardware.freed import steady_memory
from tunesmith.hardware.memory import PeakMemory
from tunesmith.io.atomic import append_jsonl, commit_folder, sha256_file, write_json
from tunesmith.methods import METHODS, Method, make_method
from tunesmith.methods.settings import Settings, auto_batch, auto_rank, settle
from tunesmith.models.load import load_tokenizer, model_digest
from tunesmith.recipe import Recipe
from tunesmith.runs import Run
from tunesmith.sections import NAMED_REWARDS, SAMPLED, SamplingSection
from tunesmith.stages.train.compiling import compile_blocks
from tunesmith.stages.train.metrics import StepMetrics
from tunesmith.stages.train.progress import TrainProgress
from tunesmith.stages.train.rewards import Reward, check_references, make_rewards
from tunesmith.stages.train.summary import figures_of, tell_settings, total_parameters

#: What a folder of trained weights is committed as.
CHECKPOINT = "checkpoint"

#: Rows, or answers, that are padded together where the recipe leaves it open.
ROWS_AT_ONCE = 8

#: A column that only the rows of these objectives have.
_COLUMNS = {
    "kto": "label",
    **dict.fromkeys(("orpo", "reward"), "rejected_input_ids"),
    **dict.fromkeys(SAMPLED, "prompt_ids"),
}


@dataclass
class Recorder:
    """Writes a line of metrics.jsonl for each step and keeps them."""

    path: Path
    steps: int
    progress: TrainProgress
    history: list[StepMetrics] = field(default_factory=list)
    begun: float = 0.0

    def start(self) -> None:
        """Start the clock of the first step."""
        self.begun = time.perf_counter()

    def record(self, values: Mapping[str, float], tokens: tuple[int, int, int], figures: Mapping[str, float]) -> None:
        """A step: `values` has loss, grad_norm and learning_rate; `tokens` counts real, computed and labelled ones."""
        now = time.perf_counter()
        real, computed, labelled = tokens
        metrics = StepMetrics(
            step=len(self.history) + 1,
            loss=float(values["loss"]),
            grad_norm=float(values["grad_norm"]),
            learning_rate=float(values["learning_rate"]),
            tokens=real,
            computed_tokens=computed,
            labelled_tokens=labelled,
            seconds=now - self.begun,
            figures=dict(figures),
        )
        self.begun = now
        self.history.append(metrics)
        append_jsonl(self.path, metrics.as_dict())
        self.progress.step(metrics, self.steps)


@dataclass(frozen=True)
class Work:
    """All that a loop needs: the model as its method built it, the rows, the settled settings, where it may write."""

    run: Run
    method: Method
    model: Any
    tokenizer: Any
    rows: Any
    settings: Settings
    hardware: Hardware
    scratch: Path
    recorder: Recorder
    rewards: list[Reward]
    weights: list[float]


#: Trains and returns a context in which the model has the weights as they were trained, in float32, for saving.
Loop = Callable[[Work], AbstractContextManager[None]]


def require_trl(objective: str) -> None:
    """Raise TrainError where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        why = "its loop and loss are TRL's"
        fix = "pip install 'tunesmith[trl]'"
        raise TrainError(Problem("TS302", f"objective: {objective} needs TRL, which is not installed", "objective", why, fix))


def reward_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of the files and folders that rewards come from."""
    if recipe.objective not in SAMPLED:
        return {}
    digests = {}
    for name in getattr(recipe, recipe.objective).reward_funcs:
        if name in NAMED_REWARDS or name.startswith("length:"):
            continue
        path = Path(name.rpartition(":")[0] or name)
        digests[f"reward {name}"] = sha256_file(path) if path.is_file() else model_digest(path) if path.is_dir() else "missing"
    return digests


def train_beside(run: Run, model_folder: Path, folder: Path, console: Console) -> None:
    """Train one of these objectives and fill `folder` as the engine does.

    Raises TrainError where TRL is missing, a reward cannot be used, or loss or gradients stop being finite.
    """
    recipe, hardware = run.recipe, detect()
    loop = _loop(recipe.objective)
    rows = _rows(run)
    rewards, weights = _rewards(recipe, rows)
    settings = settle_beside(recipe, len(rows), hardware)
    tell_settings(run, settings, hardware, folder)
    if recipe.train.packing:
        reason = f"objective: {recipe.objective} does not run on prefix trees"
        run.event(folder, "packing-off", f"rows are padded: {reason}", reason=reason)
    if hardware.device == "cpu":
        steady_memory()
    meter = PeakMemory()
    set_seed(recipe.seed)
    dtype, rank, alpha = settings.compute_dtype, settings.r, settings.lora_alpha
    method = make_method(recipe, model_folder, compute_dtype=dtype, r=rank, lora_alpha=alpha)
    tokenizer = load_tokenizer(model_folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (run.path / "data" / "chat_template.jinja").read_text(encoding="utf-8")
    model = _model(recipe, method, tokenizer.pad_token_id)
    compile_blocks(run, model, folder)
    trainable = method.trainable_parameters(model)
    total = total_parameters(model)
    meter.reset()
    with tempfile.TemporaryDirectory() as scratch, TrainProgress(recipe.method, settings.max_steps, console) as progress:
        recorder = Recorder(folder / "metrics.jsonl", settings.max_steps, progress)
        work = Work(run, method, model, tokenizer, rows, settings, hardware, Path(scratch), recorder, rewards, weights)
        as_trained = loop(work)
        peak = meter.peak_bytes()
        checkpoint = folder / "checkpoints" / f"step-{recorder.history[-1].step:06d}"
        with commit_folder(checkpoint, CHECKPOINT) as target, as_trained:
            method.save(model, target)
    summary = {
        "method": recipe.method,
        "objective": recipe.objective,
        "checkpoint": checkpoint.relative_to(run.path).as_posix(),
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_memory_bytes": peak,
    }
    write_json(folder / "summary.json", summary | figures_of(recorder.history, 0.0))


def _loop(objective: str) -> Loop:
    if objective == "ppo":
        from tunesmith.stages.train.ppo import train_ppo

        return train_ppo
    require_trl(objective)
    from tunesmith.stages.train.trl_loops import LOOPS

    return LOOPS[objective]


def _rewards(recipe: Recipe, rows: Any) -> tuple[list[Reward], list[float]]:
    """The rewards and their weights, where answers are sampled; what is wrong with them shows before a model is loaded."""
    if recipe.objective not in SAMPLED:
        return [], []
    asked: SamplingSection = getattr(recipe, recipe.objective)
    made = make_rewards(asked, recipe.objective)
    check_references(asked, rows)
    return made


def _model(recipe: Recipe, method: Method, pad_token_id: int) -> Any:
    if recipe.objective != "reward":
        return method.build()
    from tunesmith.methods.scorer import build_scorer

    return build_scorer(method, pad_token_id)


def _rows(run: Run) -> Any:
    rows = Dataset.from_file(str(run.path / "data" / "train.arrow"))
    if _COLUMNS[run.recipe.objective] not in rows.column_names:
        why = "what a row's columns mean depends on the objective"
        what = f"the rows were not prepared for objective: {run.recipe.objective}"
        raise DataError(Problem("TS113", what, "data/train.arrow", why, "run `tunesmith prepare` again"))
    if len(rows) == 0:
        why = "training over nothing changes nothing"
        raise DataError(Problem("TS109", "no train rows", str(run.path / "data"), why, "lower data.heldout"))
    return rows


def settle_beside(recipe: Recipe, rows: int, hardware: Hardware) -> Settings:
    """The settings of a run over `rows` rows; a batch counts answers where several are sampled for each prompt.

    Raises RecipeError where a batch does not hold whole groups, more prompts than there are, or for KTO less than two rows.
    """
    asked, group = recipe.train, _group(recipe)
    changes: dict[str, Any] = {}
    if asked.effective_batch_size == "auto" and "auto" in {
        asked.gradient_accumulation_steps,
        asked.per_device_train_batch_size,
    }:
        batch = min(auto_batch(rows * group * asked.num_train_epochs), rows * group)
        changes["effective_batch_size"] = -(-batch // group) * group
    if asked.per_device_train_batch_size == "auto" and asked.gradient_accumulation_steps == "auto":
        changes["per_device_train_batch_size"] = ROWS_AT_ONCE
    concrete = recipe.model_copy(update={"train": asked.model_copy(update=changes)})
    settings = settle(concrete, rows * group, METHODS[recipe.method].default_learning_rate, hardware)
    reasons = settings.reasons | {
        name: f"{rows} train rows" + (f", {group} answers each" if group > 1 else "")
        if name == "effective_batch_size"
        else f"at most {ROWS_AT_ONCE} sequences are padded together"
        for name in changes
    }
    reasons.pop("per_device_max_tokens", None)  # micro-batches go by rows
    settings = replace(settings, reasons=reasons, per_device_max_tokens=None, micro_batch_start=None)
    if recipe.lora.r == "auto":
        rank = auto_rank(rows)
        alpha = 2 * rank if recipe.lora.lora_alpha == "auto" else settings.lora_alpha
        settings = replace(settings, r=rank, lora_alpha=alpha, reasons=reasons | {"r": f"{rows} train rows"})
    _check_batch(recipe, settings, rows, group)
    return settings


def _group(recipe: Recipe) -> int:
    return int(getattr(getattr(recipe, recipe.objective), "num_generations", 1))


def _check_batch(recipe: Recipe, settings: Settings, rows: int, group: int) -> None:
    batch, where = settings.effective_batch_size, "train.effective_batch_size"
    if batch % group:
        what, fix = f"{batch} answers a step are no whole groups of {group}", f"make it a multiple of {group}"
        raise RecipeError(Problem("TS003", what, where, "answers to one prompt are compared with each other", fix))
    if recipe.objective in SAMPLED and batch // group > rows:
        what, fix = f"{batch // group} prompts a step, but there are {rows}", f"set it to at most {rows * group}"
        raise RecipeError(Problem("TS003", what, where, "a step is filled with different prompts", fix))
    if recipe.objective == "kto" and settings.per_device_train_batch_size < 2:
        why = "KTO takes the divergence from answers to other prompts of the same micro-batch"
        what = "one row at a time with objective: kto"
        raise RecipeError(Problem("TS003", what, "train.per_device_train_batch_size", why, "set it to at least 2"))
