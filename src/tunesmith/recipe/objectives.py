"""The objectives: the data, the training loop and the recipe keys of each. One table row per objective, and its section.

Everything that differs by objective is read from its row here, or done by the loop that the row names. To add an objective,
add a row, its section, and a module in `stages.train.loops` if no existing loop trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith.recipe.sections import NotNegative, Positive, PositiveInt, Section, Share

#: What a row is: a conversation, a document, two answers to one prompt, a judged answer, or a prompt.
RowKind = Literal["conversation", "document", "pair", "judged", "prompt"]


class DpoSection(Section):
    """Direct preference optimization, keys as in TRL: the sigmoid loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""

    beta: Positive = 0.1
    """How strongly the model is held to the reference: rewards are beta x the change in log-probability of an answer."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs with swapped labels."""


class KtoSection(Section):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306), with `objective: kto`."""

    beta: Positive = 0.1
    """How strongly the model is held to the reference."""
    desirable_weight: Positive = 1.0
    """Weight of the rows with `label: true`."""
    undesirable_weight: Positive = 1.0
    """Weight of the rows with `label: false`."""


class OrpoSection(Section):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), with `objective: orpo`."""

    beta: Positive = 0.1
    """Weight of the odds-ratio term relative to the loss of the chosen answer (lambda in the paper)."""


class RewardSection(Section):
    """A reward model on pairs (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155), with `objective: reward`."""

    center_rewards_coefficient: Positive | None = None
    """Weight of a term that keeps the mean reward at 0; 0.01 in the paper that proposes it (arXiv 2312.09244)."""


class SamplingSection(Section):
    """Keys shared by the objectives that sample answers to prompts and score them."""

    reward_funcs: list[str] = Field(default_factory=list)
    """Rewards of an answer, summed: `json-fields`, `valid-json`, `length:LOW-HIGH` (characters), `FILE.py:FUNCTION`, or the
    folder of an exported reward model."""
    reward_weights: list[float] | None = None
    """A weight for each of reward_funcs; default: 1 each."""
    max_completion_length: PositiveInt = 256
    """Maximum length of a sampled answer, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature."""


class GrpoSection(SamplingSection):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300), with `objective: grpo`."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers sampled per prompt; they are compared with each other."""
    num_iterations: PositiveInt = 1
    """Optimizer passes over each batch of answers."""
    beta: NotNegative = 0.0
    """Weight of the KL divergence from the initial model; 0 keeps no reference."""
    epsilon: Positive = 0.2
    """How far an answer's probability ratio may leave 1 within one batch before its gradient is clipped."""


class RlooSection(SamplingSection):
    """REINFORCE with the other answers' mean as baseline (Ahmadian et al. 2024, arXiv 2402.14740), with `objective: rloo`."""

    num_generations: Annotated[int, Field(ge=2)] = 2
    """Answers sampled per prompt; each is compared with the mean of the others."""
    num_iterations: PositiveInt = 1
    """Optimizer passes over each batch of answers."""
    beta: NotNegative = 0.05
    """Weight of the KL divergence from the initial model, subtracted from the reward; 0 keeps no reference."""
    epsilon: Positive = 0.2
    """How far an answer's probability ratio may leave 1 within one batch before its gradient is clipped."""


class PpoSection(SamplingSection):
    """Proximal policy optimization with a value head (Schulman et al. 2017, arXiv 1707.06347), with `objective: ppo`."""

    num_ppo_epochs: PositiveInt = 4
    """Passes over each batch of answers; each pass is one update, and all of them together are one step."""
    cliprange: Positive = 0.2
    """How far the probability ratio may leave 1 before the gradient is clipped."""
    cliprange_value: Positive = 0.2
    """How far a value may move within one batch before its gradient is clipped."""
    vf_coef: NotNegative = 0.1
    """Weight of the value head's loss."""
    kl_coef: NotNegative = 0.05
    """Weight of the KL divergence from the initial model, subtracted from the reward per token."""
    gamma: Share = 1.0
    """Discount factor of later rewards."""
    lam: Share = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438)."""


#: Built-in rewards, except `length:LOW-HIGH`.
NAMED_REWARDS = ("json-fields", "valid-json")


def absolute_reward(name: str, base: Path) -> str:
    """A name from `reward_funcs`, with its file or folder resolved against `base`."""
    if name in NAMED_REWARDS or name.startswith("length:"):
        return name
    path, colon, function = name.rpartition(":")
    if not colon:
        return str((base / name).resolve())
    return f"{(base / path).resolve()}:{function}"


#: Keys that only the engine supports: the value that leaves each one off, and why the other loops do not support it.
_ENGINE_ONLY: Mapping[str, tuple[Any, str]] = {
    "train.optimizer_in_backward": (False, "gradients are accumulated over micro-batches"),
    "train.eval_steps": (None, "the held-out loss is not computed during training"),
    "train.early_stopping_patience": (None, "the held-out loss is not computed during training"),
    "train.neftune_noise_alpha": (None, "noise on the embeddings would distort the comparison of two answers"),
    "train.per_device_max_tokens": ("auto", "micro-batches are sized in rows: train.per_device_train_batch_size"),
    "train.activation_offloading": (False, "only the engine's loop supports it"),
    "train.save_steps": ("auto", "only the engine's loop resumes; this one starts over after an interruption"),
    "train.on_spike": ("tell", "there is no savepoint to roll back to"),
    "train.attn_implementation": ("auto", "rows are padded, and attention is SDPA"),
    "train.shifted_sparse_attention": (None, "sampled answers would attend to tokens that the trained model does not see"),
    "lora.lora_dropout": (0.0, "dropout is off, because answers are compared with each other"),
}

#: Peak learning rates by method. For preferences: the starting values of TRL's DPOConfig and its page on adapters, a twentieth
#: of SFT's; the gradient pulls two answers apart even if the model knows both. TRL's KTO, ORPO, GRPO and RLOO also default to
#: 1e-6, its RewardConfig to 1e-4, and its pages use ten times as much for adapters. PPO uses GRPO's rates.
_SFT = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
_PREFERENCE = {"full": 1e-6, "lora": 1e-5, "qlora": 1e-5}
_REWARD = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}


@dataclass(frozen=True)
class Objective:
    """One objective.

    `what` describes it, to follow its name; `rows` is the kind of row it learns from; `loop` is the module of
    `stages.train.loops` that trains it; `section` is its own part of the recipe, under its name. `planned`: `plan` models its
    memory and time. `reward_model`: it trains a reward model, which is exported as one and generates no answers. `extra` is
    the package extra that installs its loop. `unsupported` maps dotted keys that its loop does not support to the value that
    leaves each one off and the reason.
    """

    name: str
    what: str
    rows: RowKind
    loop: str
    learning_rates: Mapping[str, float]
    section: type[Section] | None = None
    planned: bool = False
    reward_model: bool = False
    extra: str | None = None
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def on_engine(self) -> bool:
        """Whether the engine trains it: on prefix trees, in several processes, and resumable."""
        return self.loop == "engine"

    @property
    def sampled(self) -> bool:
        """Whether answers are sampled during training and scored by rewards."""
        return self.rows == "prompt"


_IN_TRL: Mapping[str, Any] = {"extra": "trl", "unsupported": _ENGINE_ONLY}
_SAMPLES = "samples answers and learns from their rewards"

_ROWS = (
    Objective("sft", "learns the answers", "conversation", "engine", _SFT, planned=True),
    Objective("dpo", "learns which of two answers is preferred", "pair", "engine", _PREFERENCE, DpoSection, planned=True),
    Objective("pretrain", "learns every token of raw text (continued pre-training)", "document", "engine", _SFT, planned=True),
    Objective("kto", "learns from answers judged good or bad", "judged", "kto", _PREFERENCE, KtoSection, **_IN_TRL),
    Objective("orpo", "learns answers and preferences jointly", "pair", "orpo", _PREFERENCE, OrpoSection, **_IN_TRL),
    Objective("reward", "learns to score answers", "pair", "reward", _REWARD, RewardSection, reward_model=True, **_IN_TRL),
    Objective("grpo", f"{_SAMPLES}, relative to their group", "prompt", "grpo", _PREFERENCE, GrpoSection, **_IN_TRL),
    Objective("rloo", f"{_SAMPLES}, relative to the others' mean", "prompt", "rloo", _PREFERENCE, RlooSection, **_IN_TRL),
    Objective("ppo", f"{_SAMPLES}, with a value head", "prompt", "ppo", _PREFERENCE, PpoSection, unsupported=_ENGINE_ONLY),
)

OBJECTIVES: Mapping[str, Objective] = {row.name: row for row in _ROWS}
