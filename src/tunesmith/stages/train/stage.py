"""The train stage: one engine for every method."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from tunesmith.errors import DataError, Problem, RecipeError
from tunesmith.hardware import detect
from tunesmith.hardware.freed import steady_memory
from tunesmith.hardware.memory import PeakMemory
from tunesmith.io.atomic import commit_folder, read_json, remove_folder, write_json
from tunesmith.io.terminal import make_console
from tunesmith.methods import METHODS, Method, make_method
from tunesmith.methods.settings import Settings, settle
from tunesmith.models.load import load_tokenizer, locate, model_digest
from tunesmith.packing import flex
from tunesmith.packing.batch import Collator, PaddedCollator, choose_collator, reason_against_tree
from tunesmith.packing.kernels import use_attention
from tunesmith.packing.loss import use_tree_attention
from tunesmith.packing.noise import EmbeddingNoise
from tunesmith.packing.shifted import ShiftedCollator, use_shifted_attention
from tunesmith.packing.tree import Limits
from tunesmith.quality.review import require_signoff
from tunesmith.runs import Run
from tunesmith.sections import ON_TREES
from tunesmith.stages.train.beside import CHECKPOINT, reward_digests, train_beside
from tunesmith.stages.train.compiling import compile_blocks
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.finite import NotFiniteError, check_weights, incident
from tunesmith.stages.train.going_on import Earlier, Saver, made_of
from tunesmith.stages.train.objective import Objective, StepBatches, make_objective
from tunesmith.stages.train.out_of_memory import is_out_of_memory, out_of_memory
from tunesmith.stages.train.progress import TrainProgress
from tunesmith.stages.train.ranks import Ranks, folder_of, join
from tunesmith.stages.train.setup import training_arguments
from tunesmith.stages.train.signals import StopSignals
from tunesmith.stages.train.spikes import SpikeWatch
from tunesmith.stages.train.summary import figures_of, tell_settings, total_parameters
from tunesmith.stages.train.watch import NOTHING_SEEN, HeldoutWatch, mean_loss


def train(run: Run, console: Console | None = None, *, restart: bool = False) -> dict[str, Any]:
    """Train as the recipe says and return `train/summary.json`; a no-op when data, model and settings are unchanged.

    A training that was interrupted goes on from its newest savepoint that is whole, to the same bits; with `restart` it begins
    again. Started by torchrun, all processes train the one run.

    Raises TrainError when loss or gradients stop being finite (with a folder in `train/incidents`), one row does not fit in
    memory, the loss spikes again and again, or something has changed since an interrupted training's savepoint; RunError when
    `prepare` has not run, another process works on the run, or the recipe wants its data signed off and nobody has;
    StageFailedError with exit code 130 or 143 once SIGINT or SIGTERM has stopped it.
    """
    recipe = run.recipe
    if recipe.data.require_review:
        require_signoff(run)
    model_folder = locate(recipe.model, recipe.revision)
    inputs = {
        "recipe": recipe.stage_digest("train"),
        "data": run.outputs_digest("prepare"),
        "model": model_digest(model_folder),
        **reward_digests(recipe),
    }
    ranks = join(recipe, cpu=detect().device == "cpu")
    if not ranks.agreed(run.is_current("train", inputs)):
        console = (console or make_console(stderr=True)) if ranks.first else make_console(quiet=True)
        trees = recipe.objective in ON_TREES
        keep = trees and not restart and run.was_interrupted("train")
        with folder_of(ranks, run, inputs, keep=keep) as folder:
            try:
                if trees:
                    _train(run, model_folder, folder, console, inputs, ranks)
                else:
                    train_beside(run, model_folder, folder, console)
            except Exception as error:
                if is_out_of_memory(error):  # beside a step, such as while the model is loaded
                    raise out_of_memory(recipe, None, 0, str(error)) from error
                raise
    summary: dict[str, Any] = read_json(run.path / "train" / "summary.json")
    return summary


def _train(run: Run, model_folder: Path, folder: Path, console: Console, inputs: Mapping[str, str], ranks: Ranks) -> None:
    recipe, hardware = run.recipe, detect()
    earlier = Earlier(run, folder, console)

    def tell(code: str, message: str, **facts: Any) -> None:
        run.event(folder, code, message, **facts)

    objective = make_objective(recipe)
    rows, heldout = _rows(run, objective), _heldout(run)
    settings = settle(recipe, len(rows), METHODS[recipe.method].default_learning_rate, hardware)
    tell_settings(run, settings, hardware, folder)
    earlier.look(made_of(recipe, inputs, settings) | {"processes": ranks.world})
    if hardware.device == "cpu":
        steady_memory()
    meter = PeakMemory()
    set_seed(recipe.seed)
    dtype, rank, alpha = settings.compute_dtype, settings.r, settings.lora_alpha
    method = make_method(recipe, model_folder, compute_dtype=dtype, r=rank, lora_alpha=alpha)
    model = method.build()
    compile_blocks(run, model, folder)
    batches = _batches(run, objective, model, rows, settings, folder)
    meter.reset()
    rows, seconds_before = objective.before(model, rows, batches, folder, console)
    if recipe.train.eval_steps is not None:
        heldout, more_seconds = objective.before(model, heldout, batches, folder / "heldout", console)
        seconds_before += more_seconds
    ranks.agreed(None)  # all have found the savepoint
    history = earlier.begin()
    with (
        StopSignals() as signals,
        tempfile.TemporaryDirectory() as scratch,
        TrainProgress(recipe.method, settings.max_steps, console, history) as progress,
    ):
        engine = Engine(
            objective,
            model,
            training_arguments(recipe, settings, Path(scratch), cpu=hardware.device == "cpu"),
            recipe,
            rows,
            batches,
            metrics_path=folder / "metrics.jsonl",
            tell=tell,
            ranks=ranks,
            resumed=earlier.saved,
            history=history,
        )
        checkpoints = Checkpoints(folder / "checkpoints", method, model, engine)
        checkpoints.go_on(earlier.of("checkpoint"))
        watch = _watch(run, engine, heldout, batches, checkpoints, folder, earlier.of("watch"))
        spikes = SpikeWatch(recipe.train, earlier, tell)
        spikes.go_on(earlier.of("spikes"))
        saver = Saver(
            recipe.train,
            earlier,
            signals,
            ranks,
            lambda: {"checkpoint": checkpoints.name, "watch": watch and watch.as_dict(), "spikes": spikes.as_dict()},
        )
        engine.on_step += [
            progress.step,
            lambda step, _: spikes.after_step(engine, step),
            lambda step, steps: saver.after_step(engine, step.step, steps),
        ]
        try:
            engine.train()
        except NotFiniteError as error:
            raise incident_of(engine, error, folder, settings) from error
        if saver.stopped_training:
            raise saver.stopped(engine.state.global_step, console)
    peak = meter.peak_bytes()
    if watch is None:
        checkpoints.save(engine.history[-1].step)
    if not ranks.first:
        return
    checkpoint = checkpoints.kept()
    summary = {
        "method": recipe.method,
        "checkpoint": checkpoint.relative_to(run.path).as_posix(),
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
        "trainable_parameters": method.trainable_parameters(model),
        "total_parameters": total_parameters(model),
        "peak_memory_bytes": peak,
    }
    earlier.savepoints.clear()
    write_json(folder / "summary.json", summary | figures_of(engine.history, seconds_before) | _evaluated(watch))


def incident_of(engine: Engine, error: NotFiniteError, folder: Path, settings: Settings) -> NotFiniteError:
    """The error with what is known of it in an incident folder: which rows of the step give no finite loss on their own."""
    own = [
        (row["where"], len(row["input_ids"]), mean_loss(engine.objective, engine.model, [row], engine.batches))
        for row in engine.step_rows
    ]
    return incident(
        folder,
        error,
        parameters=dict(engine.base.named_parameters()),
        rows=[row for each in engine.ranks.gathered(own) for row in each],
        steps=[step.as_dict() for step in engine.history],
        dtype=settings.compute_dtype,
    )


def _rows(run: Run, objective: Objective) -> Any:
    """The rows to train on. Raises DataError where there are none, or they were prepared for another objective."""
    rows = objective.checked(Dataset.from_file(str(run.path / "data" / "train.arrow")))
    if len(rows) == 0:
        why = "training over nothing changes nothing"
        raise DataError(Problem("TS109", "no train rows", str(run.path / "data"), why, "lower data.heldout"))
    return rows


class Checkpoints:
    """The folder of checkpoints, in which one is kept: the last that was saved."""

    def __init__(self, folder: Path, method: Method, model: Any, engine: Engine) -> None:
        self.folder, self.method, self.model, self.engine = folder, method, model, engine
        self.latest: Path | None = None

    @property
    def name(self) -> str | None:
        """The folder's name of the checkpoint that is there."""
        return None if self.latest is None else self.latest.name

    def go_on(self, name: str | None) -> None:
        """Take up the checkpoint of this name, and remove what came after it."""
        self.latest = None if name is None else self.folder / name
        for path in self.folder.glob("step-*"):
            if path != self.latest:
                remove_folder(path)

    def save(self, step: int) -> None:
        """Commit the weights as they are, then drop the checkpoint before. Raises TrainError where one is not finite."""
        check_weights(step, {name: parameter for parameter, name in self.engine.trained_parameters().items()})
        before, self.latest = self.latest, self.folder / f"step-{step:06d}"
        if not self.engine.ranks.first:
            return
        with commit_folder(self.latest, CHECKPOINT) as target, self.engine.as_trained():
            self.method.save(self.model, target)
        if before is not None and before != self.latest:
            remove_folder(before)

    def kept(self) -> Path:
        """The checkpoint that is there."""
        if self.latest is None:
            raise AssertionError("nothing was saved")
        return self.latest


def _heldout(run: Run) -> Any:
    """The held-out rows. Raises RecipeError where the recipe wants them watched and there are none, or stops by nothing."""
    asked = run.recipe.train
    rows = Dataset.from_file(str(run.path / "data" / "heldout.arrow"))
    if asked.early_stopping_patience is not None and asked.eval_steps is None:
        what, fix = "early_stopping_patience without eval_steps", "set train.eval_steps, such as 20"
    elif asked.eval_steps is not None and len(rows) == 0:
        what, fix = "eval_steps, but no rows are held out", "raise data.heldout above 0"
    else:
        return rows
    raise RecipeError(Problem("TS003", what, "train", "there would be no held-out loss to go by", fix))


def _watch(
    run: Run,
    engine: Engine,
    heldout: Any,
    batches: StepBatches,
    checkpoints: Checkpoints,
    folder: Path,
    seen: Mapping[str, Any] | None,
) -> HeldoutWatch | None:
    """Looks at the held-out rows every so many steps, where that is asked for; their time counts to no step.

    `seen` is what an earlier part of the training saw.
    """
    asked = run.recipe.train
    if asked.eval_steps is None:
        return None
    rows = list(heldout)

    def evaluate() -> float:
        begun = time.perf_counter()
        loss = mean_loss(engine.objective, engine.model, rows, batches)
        engine.leave_out(time.perf_counter() - begun)
        return loss

    def save(step: int) -> None:
        begun = time.perf_counter()
        checkpoints.save(step)
        engine.leave_out(time.perf_counter() - begun)

    watch = HeldoutWatch(
        every=asked.eval_steps,
        patience=asked.early_stopping_patience,
        path=folder / "evals.jsonl",
        evaluate=evaluate,
        save=save,
        losses=engine.losses,
        tell=lambda code, text: run.event(folder, code, text),
    )
    watch.go_on(seen or NOTHING_SEEN)
    engine.add_callback(watch)
    return watch


def _evaluated(watch: HeldoutWatch | None) -> dict[str, Any]:
    """What summary.json says of the held-out loss; nothing where nobody looked."""
    if watch is None or watch.best is None:
        return {}
    return {
        "best_step": watch.best.step,
        "best_eval_loss": watch.best.eval_loss,
        "last_eval_loss": watch.history[-1].eval_loss,
        "stopped_early": watch.stopped,
        "seconds_evaluating": watch.seconds,
    }


def _batches(run: Run, objective: Objective, model: Any, rows: Any, settings: Settings, folder: Path) -> StepBatches:
    """How the rows of a step become micro-batches; switches the model to their attention, and its noise on where asked for."""
    pad_id = load_tokenizer(locate(run.recipe.model, run.recipe.revision)).pad_token_id
    collator = _collator(run, model, pad_id, max(objective.lengths(rows)), folder)
    asked = run.recipe.train.attn_implementation
    if isinstance(collator, ShiftedCollator):
        use_shifted_attention(model)
    elif isinstance(collator, PaddedCollator):
        use_attention(model, "sdpa" if asked == "auto" else asked, lambda text: run.event(folder, "attention-fallback", text))
    else:
        use_tree_attention(model, on=True)
        reason = None if model.device.type == "cpu" else flex.reason_against(model.device, model.dtype)
        if reason is not None:
            run.event(folder, "attention-fallback", f"a dense mask in place of flex attention: {reason}", reason=reason)
    if run.recipe.train.neftune_noise_alpha is not None:
        EmbeddingNoise(model, run.recipe.train.neftune_noise_alpha)
    limits = Limits(settings.per_device_max_tokens, settings.per_device_train_batch_size, settings.micro_batch_start)
    return objective.batches(collator, limits)


def _collator(run: Run, model: Any, pad_id: int | None, longest: int, folder: Path) -> Collator:
    """How rows become batches; an event where a tree was asked for and cannot be."""
    group = run.recipe.train.shifted_sparse_attention
    if group is not None:
        return _shifted(run, model, pad_id, longest, group, folder)
    if not run.recipe.train.packing:
        return PaddedCollator(pad_id)
    asked = run.recipe.train.attn_implementation
    collator, reason = choose_collator(model.config, pad_id, longest)
    if asked != "auto":
        collator, reason = PaddedCollator(pad_id), f"attn_implementation is {asked}, and trees have their own"
    if reason is not None:
        run.event(folder, "packing-off", f"rows are padded, those of like length together: {reason}", reason=reason)
    return collator


def _shifted(run: Run, model: Any, pad_id: int | None, longest: int, group: int, folder: Path) -> ShiftedCollator:
    """Padded rows for shifted sparse attention; an event that they are. Raises RecipeError where it would not be exact."""
    reason = reason_against_tree(model.config, longest)  # it needs the same: causal attention and no more
    if run.recipe.objective == "dpo":
        reason = "with objective: dpo the reference would see all tokens and the trained model would not"
    elif run.recipe.train.attn_implementation != "auto":
        reason = f"it has an attention of its own, and attn_implementation is {run.recipe.train.attn_implementation}"
    if reason is not None:
        what, why = f"shifted_sparse_attention: {reason}", "the loss would not be that of the attention that is asked for"
        raise RecipeError(Problem("TS003", what, "train", why, "remove train.shifted_sparse_attention"))
    if run.recipe.train.packing:
        reason = "shifted sparse attention works on rows, not on trees"
        run.event(folder, "packing-off", f"rows are padded, those of like length together: {reason}", reason=reason)
    return ShiftedCollator(pad_id, group)
