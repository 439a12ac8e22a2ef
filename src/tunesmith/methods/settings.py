"""What the recipe leaves to `auto`, settled from facts: rows, method, hardware. Each value keeps its reason."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.errors import Problem, RecipeError
from tunesmith.hardware import Hardware
from tunesmith.recipe import Recipe, TrainSection

#: Rank by number of train rows: (rows below, r). More data can fill a larger update. The row 10k-100k is ours.
RANKS: tuple[tuple[float, int], ...] = ((1_000, 8), (10_000, 16), (100_000, 32), (math.inf, 64))

#: Effective batch: the first one whose run has at least that many optimizer steps; small data gets a smaller batch
#: rather than too few steps to learn from.
BATCHES: tuple[tuple[int, int], ...] = ((128, 2_000), (64, 500), (32, 100), (16, 50), (8, 0))


@dataclass(frozen=True)
class Settings:
    """The settled training settings; `reasons` tells for each settled value why it is what it is."""

    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    max_steps: int
    warmup_steps: int
    num_train_epochs: float
    compute_dtype: str
    r: int
    lora_alpha: int
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def auto_rank(rows: int) -> int:
    """The adapter's rank for a number of train rows."""
    return next(rank for below, rank in RANKS if rows < below)


def auto_batch(rows_seen: float) -> int:
    """The effective batch for a number of rows seen in the whole run (rows x epochs)."""
    return next(batch for batch, steps in BATCHES if rows_seen / batch >= steps)


def settle(recipe: Recipe, rows: int, default_learning_rate: float, hardware: Hardware) -> Settings:
    """All settings of a run over `rows` train rows on one device."""
    asked, reasons = recipe.train, dict[str, str]()

    def settled(name: str, value: Any, auto: Any, reason: str) -> Any:
        if value == "auto":
            reasons[name] = reason
            return auto
        reasons[name] = "recipe"
        return value

    rate = settled("learning_rate", asked.learning_rate, default_learning_rate, f"default of {recipe.method}")
    rank = settled("r", recipe.lora.r, auto_rank(rows), f"{rows} train rows")
    alpha = settled("lora_alpha", recipe.lora.lora_alpha, 2 * rank, "2 r")
    dtype = settled("compute_dtype", asked.compute_dtype, hardware.compute_dtype, hardware.compute_dtype_reason)
    micro, accumulation, batch = _batch(recipe, rows, reasons)
    steps_per_epoch = math.ceil(rows / batch)
    steps = asked.max_steps or math.ceil(steps_per_epoch * asked.num_train_epochs)
    reasons["max_steps"] = "recipe" if asked.max_steps else f"{asked.num_train_epochs:g} epochs of {steps_per_epoch} steps"
    return Settings(
        learning_rate=rate,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        effective_batch_size=batch,
        max_steps=steps,
        warmup_steps=math.ceil(asked.warmup_ratio * steps),
        num_train_epochs=steps / steps_per_epoch,
        compute_dtype=dtype,
        r=rank,
        lora_alpha=alpha,
        reasons=reasons,
    )


def _one_micro_batch(asked: TrainSection, micro: int) -> None:
    """Raise RecipeError where an update in the backward pass was asked for together with several micro-batches a step."""
    steps, batch = asked.gradient_accumulation_steps, asked.effective_batch_size
    if steps not in {"auto", 1} or batch not in {"auto", micro}:
        what = f"gradient_accumulation_steps {steps} or effective_batch_size {batch} does not go with optimizer_in_backward"
        why = "weights move with each micro-batch, there is nothing left to accumulate"
        fix = f"leave both to auto, or use optimizer_in_backward: false (one step is {micro} rows)"
        raise RecipeError(Problem("TS003", what, "train", why, fix))


def _batch(recipe: Recipe, rows: int, reasons: dict[str, str]) -> tuple[int, int, int]:
    """Micro-batch, accumulation and effective batch, whose product is exact; a micro-batch that is too large shrinks."""
    asked = recipe.train
    micro = min(asked.per_device_train_batch_size, rows)
    if asked.optimizer_in_backward:
        _one_micro_batch(asked, micro)
        accumulation = 1
        reasons["effective_batch_size"] = "optimizer_in_backward steps after each micro-batch"
    elif asked.gradient_accumulation_steps != "auto":
        accumulation = asked.gradient_accumulation_steps
        reasons["effective_batch_size"] = "per_device_train_batch_size x gradient_accumulation_steps"
    else:
        seen = rows * asked.num_train_epochs
        if asked.effective_batch_size == "auto":
            batch = min(auto_batch(seen), rows)
            reasons["effective_batch_size"] = f"{seen:g} rows are seen in the run"
        else:
            batch = asked.effective_batch_size
            reasons["effective_batch_size"] = "recipe"
        # The largest micro-batch that divides the batch, so that the batch is what was asked for.
        micro = next(size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
        accumulation = batch // micro
    reasons["per_device_train_batch_size"] = (
        "recipe" if micro == asked.per_device_train_batch_size else f"lowered from {asked.per_device_train_batch_size} to fit"
    )
    return micro, accumulation, micro * accumulation
