"""What the loops without the engine's prefix trees share: rows are padded, and a batch counts answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem, RecipeError
from tunesmith.hardware import Hardware
from tunesmith.io.atomic import commit_folder
from tunesmith.methods.settings import Settings, auto_batch, auto_rank, settle
from tunesmith.recipe import OBJECTIVES, Recipe, SamplingSection, group_of
from tunesmith.runs import Run
from tunesmith.stages.train.loops.base import CHECKPOINT, Loop, Work
from tunesmith.stages.train.loops.rewards import Reward, check_references, make_rewards
from tunesmith.stages.train.recorder import Recorder

#: Rows, or answers, that are padded together if the recipe leaves it open.
ROWS_AT_ONCE = 8


class PaddedLoop(Loop):
    """A loop over padded rows. `rewards` and `weights` come from the recipe if answers are sampled."""

    rewards: Sequence[Reward] = ()
    weights: Sequence[float] = ()

    def __init__(self, run: Run, rows: Any, tokenizer: Any) -> None:
        super().__init__(run, rows, tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if OBJECTIVES[run.recipe.objective].sampled:
            asked = run.recipe.own(SamplingSection)
            self.rewards, self.weights = make_rewards(asked)
            check_references(asked, rows)

    def settle(self, hardware: Hardware) -> Settings:
        return settle_padded(self.run.recipe, len(self.rows), hardware)

    def before(self, work: Work) -> float:
        if work.settings.packing:
            reason = f"objective: {self.run.recipe.objective} does not run on prefix trees"
            work.tell("packing-off", f"rows are padded: {reason}", reason=reason)
        return super().before(work)

    def train(self, recorder: Recorder) -> None:
        recorder.start()
        self._as_trained = self.steps(recorder)
        self._last_step = recorder.history[-1].step

    @abstractmethod
    def steps(self, recorder: Recorder) -> AbstractContextManager[None]:
        """Run all steps; returns a context in which the model has its trained weights in float32, for saving."""

    def save(self) -> Path:
        checkpoint = self.work.folder / "checkpoints" / f"step-{self._last_step:06d}"
        with commit_folder(checkpoint, CHECKPOINT) as target, self._as_trained:
            self.work.method.save(self.work.model, target)
        return checkpoint


def settle_padded(recipe: Recipe, rows: int, hardware: Hardware) -> Settings:
    """The settings of a run over `rows` rows; a batch counts answers if several are sampled for each prompt.

    Raises RecipeError if there are more prompts per step than rows, or for KTO less than two rows per micro-batch.
    """
    asked, group = recipe.train, group_of(recipe)
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
    settings = settle(concrete, rows * group, hardware)
    reasons = settings.reasons | {
        name: f"{rows} train rows" + (f", {group} answers each" if group > 1 else "")
        if name == "effective_batch_size"
        else f"at most {ROWS_AT_ONCE} sequences are padded together"
        for name in changes
    }
    reasons.pop("per_device_max_tokens", None)  # micro-batches are limited by rows
    settings = replace(settings, reasons=reasons, per_device_max_tokens=None, micro_batch_start=None)
    if recipe.lora.r == "auto":
        rank = auto_rank(rows)
        alpha = 2 * rank if recipe.lora.lora_alpha == "auto" else settings.lora_alpha
        settings = replace(settings, r=rank, lora_alpha=alpha, reasons=reasons | {"r": f"{rows} train rows"})
    _check_batch(recipe, settings, rows, group)
    return settings


def _check_batch(recipe: Recipe, settings: Settings, rows: int, group: int) -> None:
    objective, batch = OBJECTIVES[recipe.objective], settings.effective_batch_size
    if objective.sampled and batch // group > rows:
        what, fix = f"{batch // group} prompts per step, but there are {rows}", f"set it to at most {rows * group}"
        why = "a step is filled with different prompts"
        raise RecipeError(Problem("TS008", what, "train.effective_batch_size", why, fix))
    if objective.rows == "judged" and settings.per_device_train_batch_size < 2:
        why = "KTO estimates the KL divergence from answers to other prompts of the same micro-batch"
        what = f"one row per micro-batch with objective: {objective.name}"
        raise RecipeError(Problem("TS008", what, "train.per_device_train_batch_size", why, "set it to at least 2"))
