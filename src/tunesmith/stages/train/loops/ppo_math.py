"""The math of proximal policy optimization. Shapes: B answers, T tokens of the longest; `mask` (B, T) is 1 on answers.

Answers are padded on the right.
"""

from __future__ import annotations

import torch


def token_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """(B, T): minus kl_coef x the log-ratio to the reference at each token, plus the answer's score (B,) on its last one.

    Ziegler et al. 2019, arXiv 1909.08593, eq. 2.
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def advantages_of(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (B, T) by generalized advantage estimation (arXiv 1506.02438, eq. 16); 0 beyond the answers.

    The value after an answer's last token is 0.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    for place in range(rewards.shape[1] - 1, -1, -1):
        after = values[:, place + 1] if place + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, place] + gamma * after - values[:, place]
        running = (delta + gamma * lam * running) * mask[:, place]
        advantages[:, place] = running
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values with mean 0 and variance 1 over the masked positions; 0 elsewhere."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed clipped loss (arXiv 1707.06347, eq. 7, negated), and the number of positions where clipping applied."""
    ratio = torch.exp((logprobs - old) * mask)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return (torch.maximum(plain, clipped) * mask).sum(), ((clipped > plain) * mask).sum()


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange_value: float
) -> torch.Tensor:
    """The summed half squared error of the values; per token the larger of it and that of values clipped around `old`."""
    moved = old + (values - old).clamp(-cliprange_value, cliprange_value)
    return 0.5 * (torch.maximum((values - returns).square(), (moved - returns).square()) * mask).sum()
