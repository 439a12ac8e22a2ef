"""Resolves the recipe's `auto` values from rows, method and hardware. Each value keeps its reason."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tunesmith.errors import Problem, RecipeError
from tunesmith.hardware import Hardware
from tunesmith.recipe import OBJECTIVES, Checkpointing, Recipe, TrainSection, hardware_problems

#: Rank by number of train rows: (rows below, r). More data can use a larger update. The entry for 10k-100k is our choice.
RANKS: tuple[tuple[float, int], ...] = ((1_000, 8), (10_000, 16), (100_000, 32), (math.inf, 64))

#: Tokens per micro-batch if the recipe leaves both rows and tokens open: enough for GEMMs at full speed, on a laptop too.
MAX_TOKENS = 4096

#: Fixed cost of a micro-batch on a CPU, in tokens: each one reads the weights again, and accumulates weight gradients (full) or
#: dequantises again (QLoRA). It doubles if a token takes half the time. Measured by benchmarks/micro_batches.py on a
#: processor with AMX in float32 and bfloat16; one without (Zen 4) had 60, 25 and 100 in float32.
MICRO_BATCH_START = {
    "full": {"float32": 65, "bfloat16": 150},
    "lora": {"float32": 60, "bfloat16": 200},
    "qlora": {"float32": 130, "bfloat16": 340},
}

#: Rows per micro-batch if weights are updated in the backward pass, so that a step is one micro-batch.
ROWS_IN_BACKWARD = 8

#: Effective batch: the first one whose run has at least that many optimizer steps; small data sets get a smaller batch
#: rather than too few steps.
BATCHES: tuple[tuple[int, int], ...] = ((128, 2_000), (64, 500), (32, 100), (16, 50), (8, 0))


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a run trains: the recipe's `train` keys without `auto` values, and related settings.

    `reasons` has the reason for each value that the recipe may leave open.
    """

    method: str
    seed: int
    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    per_device_max_tokens: int | None
    micro_batch_start: int | None  # fixed cost of a micro-batch, in tokens, if memory is traded for time
    max_steps: int
    warmup_steps: int
    num_train_epochs: float
    compute_dtype: str
    r: int
    lora_alpha: int
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    packing: bool
    shifted_sparse_attention: int | None
    optim: str
    optimizer_in_backward: bool
    optimizer_offloading: bool
    gradient_checkpointing: Checkpointing
    activation_offloading: bool
    attn_implementation: str
    torch_compile: bool
    use_liger_kernel: bool
    neftune_noise_alpha: float | None
    eval_steps: int | None
    early_stopping_patience: int | None
    save_steps: int | Literal["auto"] | None  # `auto` saves by elapsed time
    on_spike: str
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


#: Keys of the recipe that `settle` resolves; all others are copied.
_SETTLED = {
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "effective_batch_size"),
    *("per_device_max_tokens", "max_steps", "num_train_epochs", "compute_dtype", "use_liger_kernel"),
}


def auto_rank(rows: int) -> int:
    """The adapter's rank for a number of train rows."""
    return next(rank for below, rank in RANKS if rows < below)


def auto_batch(rows_seen: float) -> int:
    """The effective batch for a number of rows seen in the whole run (rows x epochs)."""
    return next(batch for batch, steps in BATCHES if rows_seen / batch >= steps)


def settle(recipe: Recipe, rows: int, hardware: Hardware) -> Settings:
    """All settings of a run over `rows` train rows on one device. Raises RecipeError for what the device does not support."""
    asked, reasons, objective = recipe.train, dict[str, str](), OBJECTIVES[recipe.objective]
    if problems := hardware_problems(asked, cpu=hardware.device == "cpu"):
        raise RecipeError(problems)

    def settled(name: str, value: Any, auto: Any, reason: str) -> Any:
        if value == "auto":
            reasons[name] = reason
            return auto
        reasons[name] = "recipe"
        return value

    told_whole = objective.rows in {"conversation", "document"}
    reason = f"default of {recipe.method}" + ("" if told_whole else f" with {objective.name.upper()}")
    rate = settled("learning_rate", asked.learning_rate, objective.learning_rates[recipe.method], reason)
    rank = settled("r", recipe.lora.r, auto_rank(rows), f"{rows} train rows")
    alpha = settled("lora_alpha", recipe.lora.lora_alpha, 2 * rank, "2 r")
    dtype = settled("compute_dtype", asked.compute_dtype, hardware.compute_dtype, hardware.compute_dtype_reason)
    micro, accumulation, batch = _batch(recipe, rows, reasons)
    tokens = _max_tokens(asked, reasons)
    start = None
    if hardware.device == "cpu" and tokens is not None and asked.per_device_max_tokens == "auto":
        start = MICRO_BATCH_START[recipe.method][dtype]
        reasons["per_device_max_tokens"] = "upper limit; micro-batches are as small as possible at almost no cost in time"
    steps_per_epoch = math.ceil(rows / batch)
    steps = asked.max_steps or math.ceil(steps_per_epoch * asked.num_train_epochs)
    reasons["max_steps"] = "recipe" if asked.max_steps else f"{asked.num_train_epochs:g} epochs of {steps_per_epoch} steps"
    given = {each.name for each in fields(Settings)} & set(TrainSection.model_fields)
    return Settings(
        **{name: getattr(asked, name) for name in given - _SETTLED},
        method=recipe.method,
        seed=recipe.seed,
        learning_rate=rate,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        effective_batch_size=batch,
        per_device_max_tokens=tokens,
        micro_batch_start=start,
        use_liger_kernel=_liger(asked, hardware, reasons),
        max_steps=steps,
        warmup_steps=math.ceil(asked.warmup_ratio * steps),
        num_train_epochs=steps / steps_per_epoch,
        compute_dtype=dtype,
        r=rank,
        lora_alpha=alpha,
        reasons=reasons,
    )


def _liger(asked: TrainSection, hardware: Hardware, reasons: dict[str, str]) -> bool:
    """Whether to use Liger's kernels; a training tells if they are unavailable."""
    if asked.use_liger_kernel != "auto":
        reasons["use_liger_kernel"] = "recipe"
        return asked.use_liger_kernel
    if hardware.device != "cuda" or asked.torch_compile:
        return False
    reasons["use_liger_kernel"] = "norms and gated activations in one pass over memory"
    return True


def _one_micro_batch(asked: TrainSection, micro: int) -> None:
    """Raise RecipeError if the recipe asks for updates in the backward pass and for several micro-batches per step."""
    if asked.effective_batch_size not in {"auto", micro}:
        what = f"effective_batch_size {asked.effective_batch_size} with optimizer_in_backward, where a step is {micro} rows"
        why = "weights are updated with each micro-batch, so there is nothing to accumulate"
        fix = "leave it to auto, or use optimizer_in_backward: false"
        raise RecipeError(Problem("TS006", what, "train", why, fix))


def _max_tokens(asked: TrainSection, reasons: dict[str, str]) -> int | None:
    """Tokens per micro-batch, or None for no limit."""
    if asked.per_device_max_tokens != "auto":
        reasons["per_device_max_tokens"] = "recipe"
        return asked.per_device_max_tokens
    if asked.per_device_train_batch_size != "auto" or asked.optimizer_in_backward:
        reasons["per_device_max_tokens"] = "micro-batches have per_device_train_batch_size rows"
        return None
    reasons["per_device_max_tokens"] = "micro-batches hold as many rows as fit"
    return MAX_TOKENS


def _batch(recipe: Recipe, rows: int, reasons: dict[str, str]) -> tuple[int, int, int]:
    """Micro-batch, accumulation and effective batch = micro-batch x accumulation; a micro-batch that is too large shrinks."""
    asked = recipe.train
    given = asked.per_device_train_batch_size
    if asked.optimizer_in_backward:
        micro = min(ROWS_IN_BACKWARD if given == "auto" else given, rows)
        _one_micro_batch(asked, micro)
        accumulation = 1
        reasons["effective_batch_size"] = "optimizer_in_backward steps after each micro-batch"
    elif asked.gradient_accumulation_steps != "auto" and given != "auto":
        micro, accumulation = min(given, rows), asked.gradient_accumulation_steps
        reasons["effective_batch_size"] = "per_device_train_batch_size x gradient_accumulation_steps"
    else:
        batch = _effective(recipe, rows, reasons)
        if given != "auto":
            # The largest micro-batch that divides the batch, so the batch has the requested size.
            micro = next(size for size in range(min(given, rows, batch), 0, -1) if batch % size == 0)
            accumulation = batch // micro
        else:
            accumulation = 1 if asked.gradient_accumulation_steps == "auto" else asked.gradient_accumulation_steps
            micro = -(-batch // accumulation)
    reasons["per_device_train_batch_size"] = (
        "recipe" if micro == given else "all rows of a step" if given == "auto" else f"lowered from {given} to fit"
    )
    return micro, accumulation, micro * accumulation


def _effective(recipe: Recipe, rows: int, reasons: dict[str, str]) -> int:
    """Rows of an optimizer step: as requested, or by the number of rows seen in the run."""
    asked = recipe.train
    if asked.effective_batch_size != "auto":
        reasons["effective_batch_size"] = "recipe"
        return asked.effective_batch_size
    seen = rows * asked.num_train_epochs
    reasons["effective_batch_size"] = f"{seen:g} rows are seen in the run"
    return min(auto_batch(seen), rows)
