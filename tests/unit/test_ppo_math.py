"""The arithmetic of PPO against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.recipe import parse_recipe
from tunesmith.stages.train.ppo import Answers, Policy, Ppo
from tunesmith.stages.train.ppo_math import advantages_of, policy_loss, token_rewards, value_loss, whiten

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
    # 1.0 moved too far: counted from 0.2, half of 0.64; 0.1 did not: half of 0.81.
    assert float(value_loss(values, old, returns, torch.ones(1, 2), 0.2)) == pytest.approx(0.725)


def test_whitened_values() -> None:
    found = whiten(torch.tensor([[1.0, 3.0, 2.0], [2.0, 50.0, 50.0]]), MASK)
    root = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[-1 / root, 1 / root, 0], [0, 0, 0]]))


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_an_update_weighs_each_token_alike_however_many_answers_go_at_once(at_once: int) -> None:
    """Loss, gradient and clipped share against one pass over all tokens by the formulas above."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    draw = torch.Generator().manual_seed(1)
    answers = [torch.randint(1, 50, (length,), generator=draw).tolist() for length in (1, 9, 3, 6, 2)]
    prompts = [torch.randint(1, 50, (4,), generator=draw).tolist() for _ in answers]
    mask = torch.tensor([[float(place < len(answer)) for place in range(9)] for answer in answers])
    policy = Policy(model, temperature=0.9)
    torch.nn.init.normal_(policy.value_head.weight)
    with torch.no_grad():
        logprobs, values = policy(prompts, answers, 9)
    shifted = logprobs + torch.randn(mask.shape, generator=draw) * mask * 0.3
    known = Answers(prompts, answers, shifted, shifted, values, mask)
    gain, goal = (torch.randn(mask.shape, generator=draw) * mask for _ in range(2))
    recipe = parse_recipe("model: m\nobjective: ppo\ndata: {train: t}\ntrain: {max_grad_norm: 1.0e+9}", "r", Path("/nowhere"))
    ppo = Ppo.__new__(Ppo)
    ppo.policy, ppo.asked = policy, recipe.recipe.ppo
    ppo.work = SimpleNamespace(  # type: ignore[assignment]
        model=model, settings=SimpleNamespace(per_device_train_batch_size=at_once), run=SimpleNamespace(recipe=recipe.recipe)
    )
    ppo.adamw = torch.optim.SGD(policy.parameters(), lr=0.0)  # type: ignore[assignment]
    loss, norm, clipped = ppo._update(1, known, gain, goal)
    logprobs, now = policy(prompts, answers, 9)
    told, cut = policy_loss(logprobs, shifted, gain, mask, ppo.asked.cliprange)
    whole = (told + ppo.asked.vf_coef * value_loss(now, values, goal, mask, ppo.asked.cliprange_value)) / mask.sum()
    whole.backward()
    expected = torch.stack([each.grad.norm() for each in policy.parameters() if each.grad is not None]).norm()
    assert 0 < clipped < 1
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    assert norm == pytest.approx(float(expected), rel=1e-4)
    assert clipped == pytest.approx(float(cut) / 21)
