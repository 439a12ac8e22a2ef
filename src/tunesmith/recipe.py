"""The recipe: the one config of a run, read from YAML, checked whole, printable with each value's origin.

Config is data: frozen, unknown keys refused with the nearest name, all problems reported together. `auto` stands
for a value that a stage settles from facts that it alone has (rows, hardware); it writes what it settled on, and
why, into its own folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError

from tunesmith.datasections import NAMED_TEMPLATES, AugmentSection, DataSection, Part, PartSection, unread_problems
from tunesmith.errors import Problem, RecipeError
from tunesmith.io.atomic import sha256_json
from tunesmith.recipekeys import unknown_keys, validation_problems
from tunesmith.sections import (
    Auto,
    GrpoSection,
    KtoSection,
    OrpoSection,
    PositiveInt,
    PpoSection,
    RewardSection,
    RlooSection,
    Section,
    absolute_reward,
    ignored_problems,
)

Method = Literal["full", "lora", "qlora"]
Objective = Literal["sft", "dpo", "pretrain", "kto", "orpo", "reward", "grpo", "rloo", "ppo"]
Origin = Literal["default", "file", "override", "plan"]

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


class DpoSection(Section):
    """Direct preference optimization, in TRL's words: the sigmoid loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to where it started: rewards are beta x the change of an answer's log-probability."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round."""


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


class Recipe(Section):
    """One run: a model, a method, data, and how to train, export and evaluate."""

    model: str
    """`smollm2-135m-instruct` (built in), a local folder, or a hub id."""
    revision: str | None = None
    """A hub revision; a commit makes the run repeatable."""
    method: Method | Auto = "lora"
    """full, lora or qlora; `auto` takes what `plan` recommends for the data and the machine."""
    objective: Objective = "sft"
    """`sft` learns the answers, `pretrain` every token of raw text (continued pre-training); `dpo`, `kto` and `orpo` which
    answers are preferred, `reward` a model that scores answers; `grpo`, `rloo` and `ppo` sample answers and learn from their
    rewards. `kto`, `orpo`, `reward`, `grpo` and `rloo` run in TRL and want `tunesmith[trl]`: see docs/preference.md."""
    rope_scaling: RopeScalingSection | None = None
    """`{rope_type: linear, factor: 4}`: train and export with a longer window (`linear` or `yarn`, factor above 1)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seeds every draw: the held-out rows, the row order, the adapter's start, dropout."""
    data: DataSection
    """What is trained on."""
    lora: LoraSection = LoraSection()
    """The adapter."""
    train: TrainSection = TrainSection()
    """The training loop."""
    dpo: DpoSection = DpoSection()
    """The preference loss, with `objective: dpo`."""
    kto: KtoSection = KtoSection()
    """With `objective: kto`."""
    orpo: OrpoSection = OrpoSection()
    """With `objective: orpo`."""
    reward: RewardSection = RewardSection()
    """With `objective: reward`."""
    grpo: GrpoSection = GrpoSection()
    """With `objective: grpo`."""
    rloo: RlooSection = RlooSection()
    """With `objective: rloo`."""
    ppo: PpoSection = PpoSection()
    """With `objective: ppo`."""
    export: ExportSection = ExportSection()
    """The exported model."""
    evaluate: EvaluateSection = EvaluateSection()
    """The score."""
    augment: AugmentSection = AugmentSection()
    """More rows."""

    def section_digest(self, *names: str) -> str:
        """sha256 over the named top-level keys, for a stage's no-op check."""
        dumped = self.model_dump(mode="json")
        return sha256_json({name: dumped[name] for name in names})

    def stage_digest(self, stage: str) -> str:
        """sha256 over the part of the recipe that decides what a stage writes, for `prepare`, `plan`, `train` and `export`."""
        stage = stage.partition("/")[0]
        dumped = self.model_dump(mode="json")
        if stage == "prepare":
            del dumped["data"]["workers"]
        return sha256_json({name: dumped[name] for name in self.stage_sections(stage)})

    def stage_sections(self, stage: str) -> tuple[str, ...]:
        """Top-level keys that decide what a stage writes."""
        own = (self.objective,) if stage == "train" and self.objective in _OWN_SECTION else ()
        return STAGE_SECTIONS[stage] + own


#: Top-level keys of the recipe that decide what a stage writes.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("data", "seed", "objective", "rope_scaling"),
    "plan": ("model", "revision", "method", "lora", "train", "objective"),
    "train": ("model", "revision", "method", "seed", "lora", "train", "objective", "dpo", "rope_scaling"),
    "export": ("export",),
}
_OWN_SECTION = ("kto", "orpo", "reward", "grpo", "rloo", "ppo")  # objectives whose section decides what they train


class ResolvedRecipe(Section):
    """A recipe with the origin of each value, keyed by dotted name (`train.learning_rate`)."""

    recipe: Recipe
    origins: dict[str, Origin]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """The recipe in a YAML file, with `key.subkey=value` overrides applied.

    Paths of data files are made absolute, seen from the recipe's folder. Raises RecipeError with every problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            Problem("TS001", f"cannot read the recipe: {error}", str(path), "a run starts from its recipe", "check the path")
        ) from error
    return parse_recipe(text, source=str(path), base=path.resolve().parent, overrides=overrides)


def parse_recipe(text: str, source: str, base: Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """The recipe in YAML `text`; `source` names it in messages, `base` is where relative paths start."""
    values = _parse_yaml(text, source)
    origins: dict[str, Origin] = dict.fromkeys(_dotted(values), "file")
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value, override)
        origins[".".join(key.split(".")[:2])] = "override"
    problems = [*unknown_keys(Recipe, values, source)]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(Recipe, error, source)
        raise RecipeError(problems) from error
    dumped = recipe.model_dump(mode="json")
    problems += [*ignored_problems(dumped, source), *unread_problems(dumped, source)]
    if recipe.train.on_spike == "rollback" and not isinstance(recipe.train.save_steps, int):
        what, why = "on_spike: rollback without a number of save_steps", "where training goes back to would depend on the clock"
        problems.append(Problem("TS003", what, source, why, "set train.save_steps, such as 50"))
    if problems:
        raise RecipeError(problems)
    recipe = _with_absolute_paths(recipe, base)
    defaults: dict[str, Origin] = dict.fromkeys(_dotted(recipe.model_dump(mode="json")), "default")
    known = {key: origin for key, origin in origins.items() if key in defaults}
    return ResolvedRecipe(recipe=recipe, origins=defaults | known)


def dump_recipe(resolved: ResolvedRecipe) -> str:
    """YAML of the whole recipe, each value followed by its origin as a comment; `parse_recipe` reads it back."""
    lines: list[str] = []
    dumped = resolved.recipe.model_dump(mode="json")
    for key, value in dumped.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {_yaml_line(k, v)}  # {resolved.origins[f'{key}.{k}']}" for k, v in value.items()]
        else:
            lines.append(f"{_yaml_line(key, value)}  # {resolved.origins[key]}")
    return "\n".join(lines) + "\n"


def parse_dumped_recipe(text: str, source: str) -> ResolvedRecipe:
    """What `dump_recipe` wrote, with the origins that it noted."""
    resolved = parse_recipe(text, source, base=Path("/"))
    origins = dict(resolved.origins)
    section = ""
    for line in text.splitlines():
        key = line.strip().partition(":")[0]
        if not line.startswith(" "):
            section = key if line.endswith(":") else ""
        noted = line.rpartition("# ")[2]
        origin = next((known for known in get_args(Origin) if known == noted), None)
        dotted = f"{section}.{key}" if section and line.startswith(" ") else key
        if origin is not None and dotted in origins:
            origins[dotted] = origin
    return ResolvedRecipe(recipe=resolved.recipe, origins=origins)


def _yaml_line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=False, width=10**9).strip()[1:-1]


class _OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice, of which the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    why = "the recipe is the run's only config"
    try:
        values = _OnceLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        detail = getattr(error, "problem", None) or str(error)
        raise RecipeError(Problem("TS001", f"not valid YAML: {detail}", where, why, "correct that line")) from error
    except RecursionError as error:
        raise RecipeError(Problem("TS001", "nested too deeply", source, why, "flatten the recipe")) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = "nothing" if values is None else type(values).__name__
        fix = "write at least `model: smollm2-135m-instruct` and `data: {train: rows.jsonl}`"
        raise RecipeError(Problem("TS001", f"a recipe is a mapping of names to values, found {found}", source, why, fix))
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(
            Problem("TS003", f"{text!r} is not key=value", "override", "it would change nothing", "write train.max_steps=10")
        )
    return key, _parse_yaml(f"value: {value}", f"override {key}")["value"]


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *path, last = key.split(".")
    section: Any = values
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            why = "the override reaches into a plain value"
            raise RecipeError(Problem("TS003", f"{name!r} is not a section", f"override {override!r}", why, "check the key"))
    section[last] = value


def _dotted(values: Mapping[str, Any]) -> Iterable[str]:
    """Names of the recipe's values: top-level keys, and the keys of sections as `section.key`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    def absolute(value: str | None) -> str | None:
        return None if value is None else str((base / value).resolve())

    def rows(value: str | None) -> str | None:
        return value if not value or value.startswith("hub:") else absolute(value)

    def part(value: Part) -> Part:
        return value.model_copy(update={"path": rows(value.path)})

    data: dict[str, Any] = {"train": rows(recipe.data.train), "sources": [part(source) for source in recipe.data.sources]}
    data["test"] = part(recipe.data.test) if isinstance(recipe.data.test, PartSection) else rows(recipe.data.test)
    if recipe.data.chat_template not in NAMED_TEMPLATES:
        data["chat_template"] = absolute(recipe.data.chat_template)
    data["review"] = absolute(recipe.data.review)
    overlap = {key: absolute(value) for key, value in recipe.data.overlap}
    evaluate = {key: absolute(getattr(recipe.evaluate, key)) for key in ("json_schema", "mmlu")}
    sampling = {
        key: section.model_copy(update={"reward_funcs": [absolute_reward(each, base) for each in section.reward_funcs]})
        for key, section in (("grpo", recipe.grpo), ("rloo", recipe.rloo), ("ppo", recipe.ppo))
    }
    model = recipe.model
    if model.startswith((".", "/", "~")):
        model = str((base / Path(model).expanduser()).resolve())
    return recipe.model_copy(
        update={
            "model": model,
            "data": recipe.data.model_copy(update=data | {"overlap": recipe.data.overlap.model_copy(update=overlap)}),
            "augment": recipe.augment.model_copy(update={"out": absolute(recipe.augment.out)}),
            "evaluate": recipe.evaluate.model_copy(update=evaluate),
            **sampling,
        }
    )
