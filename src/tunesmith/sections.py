"""The recipe's sections of the objectives beside `sft` and `dpo`, in TRL's words, and the base of all sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.errors import Problem

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class KtoSection(Section):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306), with `objective: kto`."""

    beta: Positive = 0.1
    """How strongly the model is held to where it started."""
    desirable_weight: Positive = 1.0
    """Weight of the rows with `label: true`."""
    undesirable_weight: Positive = 1.0
    """Weight of the rows with `label: false`."""


class OrpoSection(Section):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), with `objective: orpo`."""

    beta: Positive = 0.1
    """Weight of the odds ratio beside the loss of the chosen answer (lambda in the paper)."""


class RewardSection(Section):
    """A reward model on pairs (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155), with `objective: reward`."""

    center_rewards_coefficient: Positive | None = None
    """Weight of a term that keeps the rewards' mean at 0; 0.01 in the paper that proposes it (arXiv 2312.09244)."""


class SamplingSection(Section):
    """What objectives share that sample answers to prompts and score them."""

    reward_funcs: list[str] = []
    """What scores an answer, summed: `json-fields`, `valid-json`, `length:LOW-HIGH` (characters), `FILE.py:FUNCTION`, or the
    folder of an exported reward model."""
    reward_weights: list[float] | None = None
    """A weight for each of reward_funcs; without it all weigh 1."""
    max_completion_length: PositiveInt = 256
    """Longest answer sampled, in tokens."""
    temperature: Positive = 1.0
    """Temperature of the sampling."""


class GrpoSection(SamplingSection):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300), with `objective: grpo`."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for each prompt; they are compared with each other."""
    num_iterations: PositiveInt = 1
    """Optimizer passes over each batch of answers."""
    beta: NotNegative = 0.0
    """Weight of the divergence from the untrained model; 0 keeps no reference."""
    epsilon: Positive = 0.2
    """How far an answer's probability may move in one batch before its gradient is cut."""


class RlooSection(SamplingSection):
    """REINFORCE with the other answers' mean as baseline (Ahmadian et al. 2024, arXiv 2402.14740), with `objective: rloo`."""

    num_generations: Annotated[int, Field(ge=2)] = 2
    """Answers sampled for each prompt; each is compared with the mean of the others."""
    num_iterations: PositiveInt = 1
    """Optimizer passes over each batch of answers."""
    beta: NotNegative = 0.05
    """Weight of the divergence from the untrained model, taken off the reward; 0 keeps no reference."""
    epsilon: Positive = 0.2
    """How far an answer's probability may move in one batch before its gradient is cut."""


class PpoSection(SamplingSection):
    """Proximal policy optimization with a value head (Schulman et al. 2017, arXiv 1707.06347), with `objective: ppo`."""

    num_ppo_epochs: PositiveInt = 4
    """Passes over each batch of answers; each is one update, all of them are one step."""
    cliprange: Positive = 0.2
    """How far the ratio of probabilities may leave 1 before the gradient is cut."""
    cliprange_value: Positive = 0.2
    """How far a value may move in one batch before its gradient is cut."""
    vf_coef: NotNegative = 0.1
    """Weight of the value head's loss."""
    kl_coef: NotNegative = 0.05
    """Weight of the divergence from the untrained model, taken off the reward token by token."""
    gamma: Share = 1.0
    """Discount of later rewards."""
    lam: Share = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438)."""


#: Rewards that tunesmith has itself, but for `length:LOW-HIGH`.
NAMED_REWARDS = ("json-fields", "valid-json")


def absolute_reward(name: str, base: Path) -> str:
    """A name of `reward_funcs` with its file or folder made absolute, seen from `base`."""
    if name in NAMED_REWARDS or name.startswith("length:"):
        return name
    path, colon, function = name.rpartition(":")
    if not colon:
        return str((base / name).resolve())
    return f"{(base / path).resolve()}:{function}"


#: Objectives that the engine trains itself, on prefix trees, and that `plan` accounts for.
ON_TREES = ("sft", "pretrain", "dpo")

#: Objectives on pairs of answers.
ON_PAIRS = ("dpo", "orpo", "reward")

#: Objectives that sample answers.
SAMPLED = ("grpo", "rloo", "ppo")

#: Keys that the loops of these objectives do not honour: what leaves each at rest, and why.
_NOT_HONOURED: dict[str, tuple[Any, str]] = {
    "train.optimizer_in_backward": (False, "gradients are accumulated over micro-batches"),
    "train.eval_steps": (None, "the held-out loss is not taken while training"),
    "train.early_stopping_patience": (None, "the held-out loss is not taken while training"),
    "train.neftune_noise_alpha": (None, "noise on the embeddings would blur what two answers are compared by"),
    "train.per_device_max_tokens": ("auto", "micro-batches go by rows: train.per_device_train_batch_size"),
    "train.activation_offloading": (False, "the loop is not the engine's"),
    "train.save_steps": ("auto", "the loop is not the engine's, and begins again when it was interrupted"),
    "train.on_spike": ("tell", "there is no savepoint to go back to"),
    "train.attn_implementation": ("auto", "rows are padded and attention is SDPA"),
    "train.shifted_sparse_attention": (None, "sampled answers would attend to what the trained model does not see"),
    "lora.lora_dropout": (0.0, "dropout is switched off, for answers are compared with each other"),
}


def ignored_problems(values: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """The keys of a dumped recipe that would be without effect: of another objective, or not honoured by this one."""
    objective, why = values["objective"], "a key that nothing reads would be silently without effect"
    sections: dict[str, type[Section]] = {
        "kto": KtoSection,
        "orpo": OrpoSection,
        "reward": RewardSection,
        "grpo": GrpoSection,
        "rloo": RlooSection,
        "ppo": PpoSection,
    }
    for name, section in sections.items():
        if name != objective and values[name] != section().model_dump(mode="json"):
            fix = f"remove the section, or set objective: {name}"
            yield Problem("TS003", f"{name}: it is for objective: {name}, not {objective}", source, why, fix)
    train = values["train"]
    if train["torch_compile"] and train["use_liger_kernel"]:
        what, only = "torch_compile with use_liger_kernel", "both make the same operators, and one of them would not be used"
        yield Problem("TS003", what, source, only, "leave one of them out")
    if train["gradient_checkpointing"] == "keep_attention" and train["attn_implementation"] == "eager":
        what = "gradient_checkpointing: keep_attention with attn_implementation: eager, which has no one result to keep"
        yield Problem("TS003", what, source, why, "set train.gradient_checkpointing: true, or another attn_implementation")
    if objective == "reward" and values["rope_scaling"] is not None:
        yield Problem(
            "TS003", "rope_scaling with objective: reward", source, why, "scale the positions when the policy is trained"
        )
    if objective not in sections:
        return
    for key, (rest, reason) in _NOT_HONOURED.items():
        section_name, _, name = key.partition(".")
        if values[section_name][name] != rest:
            what = f"{key} with objective: {objective}: {reason}"
            yield Problem("TS003", what, source, why, f"leave {key} at {rest!r}")
