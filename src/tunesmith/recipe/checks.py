"""Cross-key rules of a recipe: checked before anything runs, and all violations are reported together.

A rule that needs more than the recipe lives where that information is available: the machine (`hardware_problems`, for `run`
and `train`), the number of rows (`methods.settings`, `stages.train.loops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.errors import Problem
from tunesmith.recipe.data import CleanSection
from tunesmith.recipe.model import Recipe, TrainSection
from tunesmith.recipe.objectives import NAMED_REWARDS, OBJECTIVES, SamplingSection
from tunesmith.recipe.rules import OF_TEXTS

_NO_EFFECT = "a key that nothing reads would silently have no effect"

#: Keys about turns and answers, which raw text does not have, and the value that leaves each one off.
_OF_CONVERSATIONS: dict[str, Any] = {
    "data.format": "auto",
    "data.system": None,
    "data.chat_template": None,
    "data.clean": CleanSection().model_dump(mode="json"),
    "evaluate.json_schema": None,
    "evaluate.label": None,
}

#: GPU-only keys: the key, the reason, and the alternative.
_FOR_GPUS = (
    (
        "activation_offloading",
        "on a CPU activations are already in host memory",
        ", or use train.gradient_checkpointing: true to store fewer of them",
    ),
    (
        "optimizer_offloading",
        "on a CPU the optimizer states are already in host memory",
        ", or use train.optim: adamw_8bit for smaller ones",
    ),
    ("use_liger_kernel", "Triton compiles for GPUs", ": on a CPU tunesmith's custom kernels do the same"),
)


def recipe_problems(recipe: Recipe, source: str) -> list[Problem]:
    """All rules that the recipe breaks; `source` names where it was read from."""
    values = recipe.model_dump(mode="json")
    return [
        *_other_objectives(values, source),
        *_of_the_objective(values, source),
        *_of_the_rows(values, source),
        *_of_training(recipe, source),
        *_of_sampling(recipe, source),
    ]


def hardware_problems(train: TrainSection, *, cpu: bool) -> list[Problem]:
    """The keys that this machine does not support."""
    return [
        Problem("TS007", f"{name} without a GPU", "train", why, f"remove it{instead}")
        for name, why, instead in _FOR_GPUS
        if getattr(train, name) is True and cpu
    ]


def export_problems(recipe: Recipe) -> list[Problem]:
    """What can be trained but not exported: a reward model on a 4-bit base."""
    if not OBJECTIVES[recipe.objective].reward_model or recipe.method != "qlora":
        return []
    what = "a QLoRA reward model has its head and adapter on 4-bit weights, which cannot be merged"
    why = "merged into other weights, it would give different rewards"
    fix = "use the checkpoint (PEFT opens adapter and head on the 4-bit base), or train with method: lora"
    return [Problem("TS402", what, "export", why, fix)]


def _other_objectives(values: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """Sections of other objectives. Those of engine objectives (`dpo`) are allowed: every train digest includes them."""
    for name, objective in OBJECTIVES.items():
        section = objective.section
        if section is None or objective.on_engine or name == values["objective"]:
            continue
        if values[name] != section().model_dump(mode="json"):
            what = f"section {name} is for objective: {name}, not {values['objective']}"
            yield Problem("TS005", what, source, _NO_EFFECT, f"remove the section, or set objective: {name}")


def _of_the_objective(values: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """Keys that the objective's loop does not support."""
    objective = OBJECTIVES[values["objective"]]
    for key, (rest, reason) in objective.unsupported.items():
        section, _, name = key.partition(".")
        if values[section][name] != rest:
            what = f"{key} with objective: {objective.name}: {reason}"
            yield Problem("TS005", what, source, _NO_EFFECT, f"leave {key} at {rest!r}")
    if objective.reward_model and values["rope_scaling"] is not None:
        what, fix = f"rope_scaling with objective: {objective.name}", "set rope_scaling when you train the policy"
        yield Problem("TS005", what, source, _NO_EFFECT, fix)


def _of_the_rows(values: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """Keys about row content that the objective's rows do not have."""
    objective, data = OBJECTIVES[values["objective"]], values["data"]
    documents = objective.rows == "document"
    if objective.rows != "conversation" and data["overlong"] != "reject":
        why, fix = "only conversations can be truncated or split", "remove data.overlong, or raise data.max_length"
        if documents:
            why = "longer documents continue in further rows"
        yield Problem("TS005", f"data.overlong with objective: {objective.name}", source, why, fix)
    if not documents:
        return
    asked = [key for key, rest in _OF_CONVERSATIONS.items() if values[key.split(".")[0]][key.split(".")[1]] != rest]
    asked += [f"data.quality.{rule}" for rule in data["quality"] if rule not in OF_TEXTS]
    why = "raw text has no turns and no answers, so the key would have no effect"
    for key in asked:
        fix = "remove it, or train on conversations with objective: sft"
        yield Problem("TS005", f"{key} with objective: {objective.name}", source, why, fix)


def _of_training(recipe: Recipe, source: str) -> Iterator[Problem]:
    asked = recipe.train
    if asked.torch_compile and asked.use_liger_kernel is True:
        why = "both replace the same operators, so one of them would not be used"
        yield Problem("TS006", "torch_compile with use_liger_kernel", source, why, "remove one of them")
    if asked.gradient_checkpointing == "keep_attention" and asked.attn_implementation == "eager":
        what = "gradient_checkpointing: keep_attention with attn_implementation: eager, which has no single output to keep"
        fix = "set train.gradient_checkpointing: true, or another attn_implementation"
        yield Problem("TS006", what, source, _NO_EFFECT, fix)
    if asked.on_spike == "rollback" and not isinstance(asked.save_steps, int):
        what, why = "on_spike: rollback without a number for save_steps", "the rollback point would depend on the clock"
        yield Problem("TS006", what, source, why, "set train.save_steps, such as 50")
    yield from _of_heldout_rows(recipe, source)
    yield from _of_updates_in_backward(asked, source)
    yield from _of_shifted_attention(recipe, source)


def _of_heldout_rows(recipe: Recipe, source: str) -> Iterator[Problem]:
    asked, why = recipe.train, "there would be no held-out loss to monitor"
    if asked.early_stopping_patience is not None and asked.eval_steps is None:
        yield Problem("TS006", "early_stopping_patience without eval_steps", source, why, "set train.eval_steps, such as 20")
    if asked.eval_steps is not None and recipe.data.heldout == 0:
        yield Problem("TS006", "eval_steps, but no rows are held out", source, why, "raise data.heldout above 0")


def _of_updates_in_backward(asked: TrainSection, source: str) -> Iterator[Problem]:
    """optimizer_in_backward with several micro-batches per step; effective_batch_size is checked once the rows are known."""
    steps, tokens = asked.gradient_accumulation_steps, asked.per_device_max_tokens
    if asked.optimizer_in_backward and (steps not in {"auto", 1} or tokens != "auto"):
        what = f"gradient_accumulation_steps {steps}, per_device_max_tokens {tokens}: not with optimizer_in_backward"
        why = "weights are updated with each micro-batch, so there is nothing to accumulate"
        yield Problem("TS006", what, source, why, "leave them at auto, or set optimizer_in_backward: false")


def _of_shifted_attention(recipe: Recipe, source: str) -> Iterator[Problem]:
    if recipe.train.shifted_sparse_attention is None:
        return
    reason, objective = None, OBJECTIVES[recipe.objective]
    if objective.on_engine and objective.rows == "pair":
        reason = f"with objective: {recipe.objective} the reference would attend to all tokens, but the trained model would not"
    elif recipe.train.attn_implementation != "auto":
        reason = f"it brings its own attention, but attn_implementation is {recipe.train.attn_implementation}"
    if reason is not None:
        why = "the loss would not match the requested attention"
        yield Problem("TS006", f"shifted_sparse_attention: {reason}", source, why, "remove train.shifted_sparse_attention")


def _of_sampling(recipe: Recipe, source: str) -> Iterator[Problem]:
    """Rewards and answer groups, for objectives that sample answers."""
    if not OBJECTIVES[recipe.objective].sampled:
        return
    asked, name = recipe.own(SamplingSection), recipe.objective
    if not asked.reward_funcs:
        fix = f"name {name}.reward_funcs, such as [{NAMED_REWARDS[1]}]"
        yield Problem("TS303", "no reward", f"{source}: {name}.reward_funcs", "there would be nothing to learn from", fix)
    if asked.reward_weights is not None and len(asked.reward_weights) != len(asked.reward_funcs):
        what = f"{len(asked.reward_weights)} weights for {len(asked.reward_funcs)} rewards"
        why = "the rewards would not be weighted as intended"
        yield Problem("TS303", what, f"{source}: {name}.reward_weights", why, "give each reward one weight")
    group, batch = group_of(recipe), _batch(recipe.train)
    if batch is not None and batch % group:
        what, fix = f"{batch} answers per step do not form whole groups of {group}", f"make it a multiple of {group}"
        why = "answers to one prompt are compared with each other"
        yield Problem("TS006", what, f"{source}: train.effective_batch_size", why, fix)


def group_of(recipe: Recipe) -> int:
    """The number of answers sampled per prompt, or 1."""
    return int(getattr(getattr(recipe, recipe.objective, None), "num_generations", 1))


def _batch(asked: TrainSection) -> int | None:
    """The effective batch size if the recipe fixes it, else None."""
    if isinstance(asked.effective_batch_size, int):
        return asked.effective_batch_size
    parts = asked.per_device_train_batch_size, asked.gradient_accumulation_steps
    return parts[0] * parts[1] if isinstance(parts[0], int) and isinstance(parts[1], int) else None
