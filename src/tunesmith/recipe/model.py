"""The recipe's keys: one frozen model in which every key has a type, a default and a description.

`auto` is resolved by the stage that has the facts (rows, hardware); the stage writes the value and the reason into its own
folder.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model

from tunesmith.io.atomic import sha256_json
from tunesmith.recipe.data import AugmentSection, DataSection
from tunesmith.recipe.objectives import OBJECTIVES
from tunesmith.recipe.sections import Auto, PositiveInt, Section

Method = Literal["full", "lora", "qlora"]
Origin = Literal["default", "file", "override", "plan"]

S = TypeVar("S", bound=Section)

Rate = Annotated[float, Field(gt=0, le=1)]
Checkpointing = bool | Literal["keep_attention"]


class LoraSection(Section):
    """The adapter of LoRA and QLoRA, with PEFT's key names."""

    r: PositiveInt | Auto = "auto"
    """Rank; `auto` depends on the number of train rows."""
    lora_alpha: PositiveInt | Auto = "auto"
    """Scale of the adapter's output (alpha / r); `auto` is 2 r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get an adapter; `all-linear` is all but the head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Embedding, head and norms to train fully in addition to the adapter, selected by name suffix, as LongLoRA does:
    [embed_tokens, norm] is the embedding and every norm. If embedding and head are tied, both are trained."""


class TrainSection(Section):
    """The training loop, with transformers' key names."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the train rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; overrides num_train_epochs."""
    learning_rate: Rate | Auto = "auto"
    """Peak rate; `auto` is 2e-4 for LoRA and QLoRA, 2e-5 for full; with `objective: reward` five times as much, with all others
    except `sft` and `pretrain` a twentieth."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the rate after warmup."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps used for linear warmup from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    effective_batch_size: PositiveInt | Auto = "auto"
    """Rows (or pairs) per optimizer step over all devices; `auto` is 32 to 128 if the data allows."""
    per_device_train_batch_size: PositiveInt | Auto = "auto"
    """Rows (or pairs) per micro-batch on one device; `auto` is as many as fit into per_device_max_tokens. On a CPU, where
    memory grows with them, it is as few as cost at most 5 % of time."""
    per_device_max_tokens: PositiveInt | Auto = "auto"
    """Maximum tokens per micro-batch on one device, with shared prefixes counted once: a step's rows are split into as few
    micro-batches as possible. `auto` is 4096, or no limit if per_device_train_batch_size is given."""
    gradient_accumulation_steps: PositiveInt | Auto = "auto"
    """Micro-batches per optimizer step; `auto` follows from effective_batch_size."""
    packing: bool = True
    """Pack rows into prefix trees, so that shared prefixes are computed once; false batches rows by length and pads them."""
    shifted_sparse_attention: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """LongLoRA's group size: in training, tokens attend within groups of this size, shifted by half a group for half of the
    heads. Rows are padded instead of packed; evaluation and the exported model use full attention."""
    optim: Literal["adamw", "adamw_kahan", "adamw_8bit"] = "adamw"
    """AdamW with float32 master weights and states (12 bytes per bf16 weight); with bf16 states and Kahan compensation (6);
    with 8-bit states (2) and stochastic rounding of the weights."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is ready, then free it; one micro-batch per step, clipped per weight."""
    optimizer_offloading: bool = False
    """Keep optimizer states and master weights in host memory and stream them slice by slice in each step (GPU only). Results
    are bit-identical. Paged optimizers do this only when memory is short; here the cost is known in advance."""
    gradient_checkpointing: Checkpointing = False
    """Recompute activations in the backward pass: less memory, about a third more time. `keep_attention` stores attention's
    output and recomputes the rest: slightly more memory, and the longer the rows, the more time it saves."""
    activation_offloading: bool = False
    """Keep activations in host memory between forward and backward pass (GPU only)."""
    attn_implementation: Literal["auto", "flash_attention_3", "flash_attention_2", "xformers", "sdpa", "eager"] = "auto"
    """Attention kernel, with transformers' names. `auto` is tree attention, or sdpa if rows are padded; any other pads rows. If
    it is unavailable, training falls back (flash, sdpa, eager) and logs an event."""
    torch_compile: bool = False
    """Fuse norms and gated activations with torch.compile; needs a C++ compiler, and half a minute at the start."""
    use_liger_kernel: bool | Auto = "auto"
    """Use Liger's Triton kernels for the same (GPU only, `pip install tunesmith[liger]`); `auto` uses them on a GPU unless
    `torch_compile` is set. An event tells if they are unavailable."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: noise on the embeddings in training, up to alpha / sqrt(row length x hidden size); 5 to 15 in the paper."""
    eval_steps: PositiveInt | None = None
    """Compute the held-out loss every this many optimizer steps, and keep the best checkpoint instead of the last."""
    early_stopping_patience: PositiveInt | None = None
    """Early stopping after this many evaluations without a new best; needs eval_steps."""
    save_steps: PositiveInt | Auto | None = "auto"
    """Write a savepoint every this many optimizer steps; `auto`: every ten minutes, or less often if saving would take more
    than 2 % of the time; null: only at a signal. `train` resumes from it by itself, bit-exactly."""
    on_spike: Literal["tell", "rollback"] = "tell"
    """What to do about a loss spike: `tell` logs it with the step's rows; `rollback` also restores the weights of the previous
    savepoint (`save_steps` must be a number) and continues with the rows after the spike."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matmuls; `auto` is bfloat16 if the hardware multiplies it faster than float32."""


class ExportSection(Section):
    """What `export` writes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "merged"
    """Subfolder of export/."""
    max_shard_size: str = "5GB"
    """Maximum size of a safetensors file."""


class EvaluateSection(Section):
    """How the task is scored."""

    task: Literal["json", "text"] = "json"
    """`json` scores fields of a JSON answer, `text` exact matches."""
    json_schema: str | None = None
    """A JSON Schema file to validate answers against."""
    label: str | None = None
    """The field whose macro-F1 is reported."""
    max_rows: PositiveInt | None = None
    """Score at most this many test rows (the first ones)."""
    max_new_tokens: PositiveInt = 128
    """Maximum tokens generated per answer."""
    batch_size: PositiveInt = 32
    """Prompts per generation batch."""
    mmlu: str | None = None
    """A folder with MMLU's dev/<subject>_dev.csv and test/<subject>_test.csv: also measures forgetting."""
    mmlu_subjects: list[str] | None = None
    """Subjects to score, by file name; default: all."""
    mmlu_questions: PositiveInt | None = None
    """Score at most this many questions per subject (the first ones)."""
    mmlu_shots: Annotated[int, Field(ge=0, le=5)] = 5
    """Few-shot examples before each question: the first ones of the dev file."""


class RopeScalingSection(Section):
    """Positions beyond the model's context window, with transformers' key names."""

    rope_type: Literal["linear", "yarn"]
    """`linear` interpolates all positions, as LongLoRA does; `yarn` interpolates fast rotations less than slow ones."""
    factor: Annotated[float, Field(gt=1)]
    """Factor by which the window (max_position_embeddings of the exported model) grows."""


class Decides:
    """Names the stages whose output depends on a top-level key: they rerun after it has changed."""

    def __init__(self, *stages: str) -> None:
        self.stages = stages


class _Common(Section):
    """One run: a model, a method, data, and how to train, export and evaluate."""

    model: Annotated[str, Decides("plan", "train")]
    """`smollm2-135m-instruct` (built in), a local folder, or a hub id."""
    revision: Annotated[str | None, Decides("plan", "train")] = None
    """A hub revision; a commit hash makes the run reproducible."""
    method: Annotated[Method | Auto, Decides("plan", "train")] = "lora"
    """full, lora or qlora; `auto` uses what `plan` recommends for the data and the machine."""
    objective: str = "sft"
    """One of OBJECTIVES."""
    rope_scaling: Annotated[RopeScalingSection | None, Decides("prepare", "train")] = None
    """`{rope_type: linear, factor: 4}`: train and export with a longer window (`linear` or `yarn`, factor above 1)."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Decides("prepare", "train")] = 42
    """Seeds all randomness: held-out rows, row order, adapter initialization, dropout."""
    data: Annotated[DataSection, Decides("prepare")]
    """The data."""
    lora: Annotated[LoraSection, Decides("plan", "train")] = LoraSection()
    """The adapter."""
    train: Annotated[TrainSection, Decides("plan", "train")] = TrainSection()
    """The training loop."""
    export: Annotated[ExportSection, Decides("export")] = ExportSection()
    """The exported model."""
    evaluate: Annotated[EvaluateSection, Decides("evaluate")] = EvaluateSection()
    """The score."""
    augment: Annotated[AugmentSection, Decides("augment")] = AugmentSection()
    """More rows."""

    def own(self, section: type[S]) -> S:
        """The section of the recipe's objective, typed as `section`."""
        found = getattr(self, self.objective, None)
        if not isinstance(found, section):
            raise AssertionError(f"objective: {self.objective} has no {section.__name__}")
        return found

    def section_digest(self, *names: str) -> str:
        """sha256 over the named top-level keys, without `data.workers`, which does not affect the result."""
        dumped = self.model_dump(mode="json", exclude={"data": {"workers"}})
        return sha256_json({name: dumped[name] for name in names})

    def stage_digest(self, stage: str) -> str:
        """sha256 over the part of the recipe that a stage's output depends on, for its no-op check."""
        return self.section_digest(*self.stage_sections(stage.partition("/")[0]))

    def stage_sections(self, stage: str) -> tuple[str, ...]:
        """Top-level keys that a stage's output depends on, without the sections of other objectives outside the engine."""
        others = {row.name for row in OBJECTIVES.values() if not row.on_engine and row.name != self.objective}
        return tuple(name for name, stages in decided().items() if stage in stages and name not in others)


def _objective_fields() -> dict[str, Any]:
    """The key `objective`, and a section for every objective that has one."""
    objectives = "; ".join(f"`{row.name}` {row.what}" for row in OBJECTIVES.values())
    needs = ", ".join(f"`{row.name}`" for row in OBJECTIVES.values() if row.extra == "trl")
    described = f"What is learned: {objectives}. {needs} run in TRL and need `tunesmith[trl]`: see docs/preference.md."
    typed = Annotated[Literal[tuple(OBJECTIVES)], Decides("prepare", "plan", "train")]  # type: ignore[valid-type] # built names
    fields: dict[str, Any] = {"objective": (typed, Field(default="sft", description=described))}
    for row in OBJECTIVES.values():
        if row.section is not None:
            default = Field(default=row.section(), description=f"With `objective: {row.name}`.")
            fields[row.name] = (Annotated[row.section, Decides("train")], default)
    return fields


if TYPE_CHECKING:
    Recipe = _Common
else:
    Recipe = create_model("Recipe", __base__=_Common, __doc__=_Common.__doc__, __module__=__name__, **_objective_fields())


@functools.cache
def decided() -> Mapping[str, tuple[str, ...]]:
    """For each top-level key of the recipe, the stages whose output depends on it."""
    return {
        name: next((each.stages for each in field.metadata if isinstance(each, Decides)), ())
        for name, field in Recipe.model_fields.items()
    }


class ResolvedRecipe(Section):
    """A recipe with the origin of each value, keyed by dotted name (`train.learning_rate`)."""

    recipe: Recipe
    origins: dict[str, Origin]
