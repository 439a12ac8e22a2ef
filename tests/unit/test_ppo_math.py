"""The arithmetic of PPO against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

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
