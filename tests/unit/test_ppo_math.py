"""The arithmetic of PPO against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.hardware import detect
from tunesmith.recipe import PpoSection, parse_recipe
from tunesmith.stages.train.loops.padded import settle_padded
from tunesmith.stages.train.loops.ppo import Answers, Ppo
from tunesmith.stages.train.loops.ppo_math import advantages_of, policy_loss, token_rewards, value_loss, whiten

MASK = torch.tensor([[1.0, 1, 1], [1, 0, 0]])


def test_the_score_stands_on_the_last_token_and_the_divergence_on_each() -> None:
    logprobs, reference = torch.tensor([[-1.0, -2, -3], [-1, 0, 0]]), torch.tensor([[-1.5, -2, -2], [-1.25, 9, 9]])
    found = token_rewards(torch.tensor([2.0, -1.0]), logprobs, reference, MASK, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.0, 2.1], [-1.025, 0, 0]]))


def test_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0, 1], [2, 0, 0]]), torch.tensor([[0.5, 0.4, 0.3], [0.5, 7, 7]])
    advantages, returns = advantages_of(rewards, values, MASK, gamma=0.9, lam=0.95)
    # delta: 1 - 0.3, 0.9 x 0.3 - 0.4, 0.9 x 0.4 - 0.5; each adds 0.855 times the advantage after it.
    torch.testing.assert_close(advantages, torch.tensor([[0.2605675, 0.4685, 0.7], [1.5, 0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.7605675, 0.8685, 1.0], [2.0, 0, 0]]))


def test_with_lambda_1_the_returns_are_the_discounted_rewards() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    _, returns = advantages_of(rewards, values, torch.ones(1, 5), gamma=0.9, lam=1.0)
    expected = [sum(0.9 ** (late - now) * float(rewards[0, late]) for late in range(now, 5)) for now in range(5)]
    assert returns[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.5, 1.0, -1.2, 1), (0.5, 1.0, -0.5, 0), (0.5, -1.0, 0.8, 1), (1.5, -1.0, 1.5, 0), (1.1, 2.0, -2.2, 0)],
)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: int) -> None:
    mask, old = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, -1.0]])
    new = torch.tensor([[-1.0 + math.log(ratio), 5.0]], requires_grad=True)
    found, count = policy_loss(new, old, torch.tensor([[advantage, 3.0]]), mask, cliprange=0.2)
    assert (float(found.detach()), int(count)) == (pytest.approx(loss), clipped)
    found.backward()
    assert new.grad is not None
    assert (float(new.grad[0, 0]) == 0) == bool(clipped)
    assert float(new.grad[0, 1]) == 0


def test_the_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    # 1.0 moved too far, so it is clipped: half of 0.64 from 0.2; 0.1 did not: half of 0.81.
    assert float(value_loss(values, old, returns, torch.ones(1, 2), 0.2)) == pytest.approx(0.725)


def test_whitened_values() -> None:
    found = whiten(torch.tensor([[1.0, 3.0, 2.0], [2.0, 50.0, 50.0]]), MASK)
    root = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[-1 / root, 1 / root, 0], [0, 0, 0]]))


class FiveAnswers:
    """Five sampled answers of different lengths, and the parts of a run that an update needs."""

    def __init__(self, at_once: int, max_grad_norm: float = 1e9, weight_decay: float = 0.1) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        draw = torch.Generator().manual_seed(1)
        answers = [torch.randint(1, 50, (length,), generator=draw).tolist() for length in (1, 9, 3, 6, 2)]
        prompts = [torch.randint(1, 50, (4,), generator=draw).tolist() for _ in answers]
        self.mask = torch.tensor([[float(place < len(answer)) for place in range(9)] for answer in answers])
        train = f"train: {{max_grad_norm: {max_grad_norm}, weight_decay: {weight_decay}}}"
        text = f"model: m\nobjective: ppo\ndata: {{train: t}}\n{train}\nppo: {{temperature: 0.9, reward_funcs: [valid-json]}}"
        recipe = parse_recipe(text, "r", Path("/nowhere")).recipe
        settings = replace(settle_padded(recipe, 5, detect()), per_device_train_batch_size=at_once, max_steps=5)
        work: Any = SimpleNamespace(
            model=self.model,
            settings=settings,
            method=SimpleNamespace(reference=lambda: None),
        )
        self.ppo = Ppo(work, recipe.own(PpoSection), SimpleNamespace(eos_token_id=2), [], [])
        torch.nn.init.normal_(self.ppo.policy.value_head.weight)
        with torch.no_grad():
            logprobs, values = self.ppo.policy(prompts, answers, 9)
        noise, self.gain, self.goal = (torch.randn(self.mask.shape, generator=draw) * self.mask for _ in range(3))
        shifted = logprobs + 0.3 * noise
        self.known = Answers(prompts, answers, shifted, shifted, values, self.mask)
        self.stepped: list[torch.Tensor] = []  # the gradients passed to the optimizer
        self.ppo.adamw = SimpleNamespace(step=self._step, zero_grad=lambda **_: self.ppo.policy.zero_grad())  # type: ignore[assignment]

    def _step(self) -> None:
        self.stepped = [each.grad.clone() for each in self.ppo.policy.parameters() if each.grad is not None]

    def update(self) -> tuple[float, float, float]:
        return self.ppo._update(1, self.known, self.gain, self.goal)


def norm_of(gradients: list[torch.Tensor]) -> float:
    return float(torch.stack([each.norm() for each in gradients]).norm())


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_an_update_weighs_each_token_alike_however_many_answers_go_at_once(at_once: int) -> None:
    """Loss, gradient and clipped share, compared with one pass over all tokens by the formulas above."""
    run = FiveAnswers(at_once)
    loss, norm, clipped = run.update()
    known, asked, mask = run.known, run.ppo.asked, run.mask
    logprobs, now = run.ppo.policy(known.prompts, known.answers, 9)
    told, cut = policy_loss(logprobs, known.logprobs, run.gain, mask, asked.cliprange)
    whole = (told + asked.vf_coef * value_loss(now, known.values, run.goal, mask, asked.cliprange_value)) / mask.sum()
    whole.backward()
    expected = [each.grad for each in run.ppo.policy.parameters() if each.grad is not None]
    assert 0 < clipped < 1
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    assert norm == pytest.approx(norm_of(expected), rel=1e-4)
    assert clipped == pytest.approx(float(cut) / 21)
    for mine, each in zip(run.stepped, expected, strict=True):
        torch.testing.assert_close(mine, each, rtol=1e-4, atol=1e-6)


def test_the_value_head_is_clipped_with_the_model() -> None:
    run = FiveAnswers(5, max_grad_norm=0.01)
    _, norm, _ = run.update()
    assert norm > 0.1  # reported before clipping
    assert norm_of(run.stepped) == pytest.approx(0.01, rel=1e-3)


def test_matrices_alone_decay() -> None:
    run = FiveAnswers(5)
    adamw = Ppo(run.ppo.work, run.ppo.asked, run.ppo.tokenizer, [], []).adamw
    decays = {id(each): group["weight_decay"] for group in adamw.param_groups for each in group["params"]}
    named = dict(run.model.named_parameters())
    assert {decays[id(each)] for each in named.values() if each.ndim == 2} == {0.1}
    assert {decays[id(each)] for each in named.values() if each.ndim == 1} == {0.0}
    assert len(decays) == len(named) + 2
