"""The recipe's keys: one frozen model, in which every key has a type, a default and a sentence.

`auto` stands for a value that a stage settles from facts that it alone has (rows, hardware); it writes what it settled on, and
why, into its own folder.
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
    """The adapter of LoRA and QLoRA, in PEFT's words."""

    r: PositiveInt | Auto = "auto"
    """Rank; `auto` goes by the number of train rows."""
    lora_alpha: PositiveInt | Auto = "auto"
    """Scale of the adapter's output (alpha / r); `auto` is 2 r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter; `all-linear` is all but the head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Embedding, head and norms that are trained whole beside the adapter, by the ends of their names, as LongLoRA does:
    [embed_tokens, norm] is the embedding and every norm. An embedding that is tied to the head takes it along."""


class TrainSection(Section):
    """The training loop, in transformers' words."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the train rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; overrides num_train_epochs."""
    learning_rate: Rate | Auto = "auto"
    """Peak rate; `auto` is 2e-4 for LoRA and QLoRA, 2e-5 for full; with `objective: reward` five times as much, with all others
    but `sft` a twentieth."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the rate moves after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm when they exceed it."""
    effective_batch_size: PositiveInt | Auto = "auto"
    """Rows (or pairs) for each optimizer step over all devices; `auto` is 32 to 128 where the data allows."""
    per_device_train_batch_size: PositiveInt | Auto = "auto"
    """Rows (or pairs) that go through the model at once on one device; `auto` is as many as per_device_max_tokens holds, on a
    CPU as few as cost at most 5 % of time, as memory grows with them."""
    per_device_max_tokens: PositiveInt | Auto = "auto"
    """Tokens that go through the model at once on one device, what rows share counted once: a step's rows become as few
    micro-batches as hold them. `auto` is 4096, or no limit where per_device_train_batch_size is given."""
    gradient_accumulation_steps: PositiveInt | Auto = "auto"
    """Micro-batches for each optimizer step; `auto` follows from effective_batch_size."""
    packing: bool = True
    """Lay rows out as prefix trees, so that what they share is computed once; else pad them to the longest of like length."""
    shifted_sparse_attention: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """LongLoRA's group size: while training, tokens attend within groups of so many, half of the heads half a group later. Rows
    are padded instead of packed; evaluation and the exported model attend to everything."""
    optim: Literal["adamw", "adamw_kahan", "adamw_bf16", "adamw_8bit"] = "adamw"
    """AdamW with float32 masters and states (12 bytes a bf16 weight); with bf16 states and what rounding cuts off (6, Kahan
    sums); with bf16 (4) or 8-bit (2) states and weights rounded stochastically."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is there and free the gradient; one micro-batch a step, clipped one by one."""
    optimizer_offloading: bool = False
    """Keep the optimizer's states and masters in the machine's memory and move them over slice by slice in each step, to the
    same bits (GPU only): what paged optimizers do when memory is short, at a cost that is known before."""
    gradient_checkpointing: Checkpointing = False
    """Recompute activations in the backward pass: less memory, about a third more time. `keep_attention` keeps what attention
    gave and recomputes all else: a little more memory, and the longer the rows the more time saved."""
    activation_offloading: bool = False
    """Keep activations in the machine's memory between forward and backward pass (GPU only)."""
    attn_implementation: Literal["auto", "flash_attention_3", "flash_attention_2", "xformers", "sdpa", "eager"] = "auto"
    """Attention's kernel, in transformers' words. `auto` is the trees' own, or sdpa where rows are padded; another one pads
    rows, and falls back (flash, sdpa, eager) where it cannot be had, with an event."""
    torch_compile: bool = False
    """Let torch.compile make one pass each of norms and gated activations; needs a C++ compiler, and half a minute at first."""
    use_liger_kernel: bool = False
    """Take Liger's Triton kernels for the same (GPU only, `pip install tunesmith[liger]`); an event where they cannot be."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: noise on the embeddings while training, up to alpha / sqrt(row length x hidden size); 5 to 15 in the paper."""
    eval_steps: PositiveInt | None = None
    """Take the held-out loss after so many optimizer steps and keep the best checkpoint instead of the last."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations without a new best; needs eval_steps."""
    save_steps: PositiveInt | Auto | None = "auto"
    """Save all that an interrupted training goes on from after so many optimizer steps; `auto` after ten minutes, or later
    where saving would take more than 2 % of the time; null at a signal alone. `train` goes on by itself, to the same bits."""
    on_spike: Literal["tell", "rollback"] = "tell"
    """What to do about a loss far above those before: tell of it with the step's rows, or also go back to the weights of the
    savepoint before (`save_steps` must be a number) and on with the rows after it."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; `auto` is bfloat16 where the hardware multiplies it faster than float32."""


class ExportSection(Section):
    """What `export` writes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "merged"
    """Folder below export/."""
    max_shard_size: str = "5GB"
    """Largest safetensors file."""


class EvaluateSection(Section):
    """How the task is scored."""

    task: Literal["json", "text"] = "json"
    """`json` scores fields of a JSON answer, `text` exact matches."""
    json_schema: str | None = None
    """A JSON Schema file that answers must satisfy."""
    label: str | None = None
    """The field whose macro-F1 is reported."""
    max_rows: PositiveInt | None = None
    """Score at most this many test rows (the first ones)."""
    max_new_tokens: PositiveInt = 128
    """Longest answer generated."""
    batch_size: PositiveInt = 32
    """Prompts generated at once."""
    mmlu: str | None = None
    """A folder with MMLU's dev/<subject>_dev.csv and test/<subject>_test.csv: also score what the model may have forgotten."""
    mmlu_subjects: list[str] | None = None
    """Subjects to score, by the names of their files; without it all."""
    mmlu_questions: PositiveInt | None = None
    """Score at most this many questions of each subject (the first ones)."""
    mmlu_shots: Annotated[int, Field(ge=0, le=5)] = 5
    """Examples before each question: the first ones of the dev file."""


class RopeScalingSection(Section):
    """Positions beyond the model's window, in transformers' words."""

    rope_type: Literal["linear", "yarn"]
    """`linear` interpolates positions, as LongLoRA does; `yarn` fast rotations less than slow ones."""
    factor: Annotated[float, Field(gt=1)]
    """The window grows by this factor: max_position_embeddings of the exported model."""


class Decides:
    """The stages whose output a top-level key decides: they do their work again once it has changed."""

    def __init__(self, *stages: str) -> None:
        self.stages = stages


class _Common(Section):
    """One run: a model, a method, data, and how to train, export and evaluate."""

    model: Annotated[str, Decides("plan", "train")]
    """`smollm2-135m-instruct` (built in), a local folder, or a hub id."""
    revision: Annotated[str | None, Decides("plan", "train")] = None
    """A hub revision; a commit makes the run repeatable."""
    method: Annotated[Method | Auto, Decides("plan", "train")] = "lora"
    """full, lora or qlora; `auto` takes what `plan` recommends for the data and the machine."""
    objective: str = "sft"
    """One of OBJECTIVES."""
    rope_scaling: Annotated[RopeScalingSection | None, Decides("prepare", "train")] = None
    """`{rope_type: linear, factor: 4}`: train and export with a longer window (`linear` or `yarn`, factor above 1)."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Decides("prepare", "train")] = 42
    """Seeds every draw: the held-out rows, the row order, the adapter's start, dropout."""
    data: Annotated[DataSection, Decides("prepare")]
    """What is trained on."""
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
        """The section of the recipe's objective, which is of this type."""
        found = getattr(self, self.objective, None)
        if not isinstance(found, section):
            raise AssertionError(f"objective: {self.objective} has no {section.__name__}")
        return found

    def section_digest(self, *names: str) -> str:
        """sha256 over the named top-level keys. How many processes read the rows decides nothing."""
        dumped = self.model_dump(mode="json", exclude={"data": {"workers"}})
        return sha256_json({name: dumped[name] for name in names})

    def stage_digest(self, stage: str) -> str:
        """sha256 over the part of the recipe that decides what a stage writes, for its no-op check."""
        return self.section_digest(*self.stage_sections(stage.partition("/")[0]))

    def stage_sections(self, stage: str) -> tuple[str, ...]:
        """Top-level keys that decide what a stage writes, without the sections of other objectives than its own."""
        others = {row.name for row in OBJECTIVES.values() if not row.on_engine and row.name != self.objective}
        return tuple(name for name, stages in decided().items() if stage in stages and name not in others)


def _objective_fields() -> dict[str, Any]:
    """The key `objective`, and a section for each objective that has one."""
    told = "; ".join(f"`{row.name}` {row.what}" for row in OBJECTIVES.values())
    needs = ", ".join(f"`{row.name}`" for row in OBJECTIVES.values() if row.extra == "trl")
    described = f"What is learned: {told}. {needs} run in TRL and want `tunesmith[trl]`: see docs/preference.md."
    typed = Annotated[Literal[tuple(OBJECTIVES)], Decides("prepare", "plan", "train")]  # type: ignore[valid-type] # names that are made
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
    """For each top-level key of the recipe the stages whose output it decides."""
    return {
        name: next((each.stages for each in field.metadata if isinstance(each, Decides)), ())
        for name, field in Recipe.model_fields.items()
    }


class ResolvedRecipe(Section):
    """A recipe with the origin of each value, keyed by dotted name (`train.learning_rate`)."""

    recipe: Recipe
    origins: dict[str, Origin]
