"""Proximal policy optimization: sample answers, score them, estimate advantages with a value head, apply clipped updates.

A step samples `effective_batch_size` answers and makes `ppo.num_ppo_epochs` updates on them. The value head reads the policy's
own last hidden states and is only needed in training, so it is not saved. The reference is the untrained model: the base under
the adapter, or with full fine-tuning a second copy.

Shapes: B answers, T tokens of the longest answer, L tokens of the longest prompt with its answer, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from tunesmith.engine.optim.adamw import AdamW, gradient_norm, store_of
from tunesmith.inference.generate import generate
from tunesmith.models.load import stop_ids
from tunesmith.recipe import PpoSection
from tunesmith.stages.train.finite import check_finite
from tunesmith.stages.train.loops.base import Work
from tunesmith.stages.train.loops.padded import PaddedLoop
from tunesmith.stages.train.loops.ppo_math import advantages_of, policy_loss, token_rewards, value_loss, whiten
from tunesmith.stages.train.loops.rewards import Reward
from tunesmith.stages.train.recorder import Recorder


@dataclass
class Answers:
    """Answers on the CPU, and for each token the log-probabilities and values before the update, all (B, T)."""

    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


class Policy(torch.nn.Module):
    """The model and a value head on its last hidden states."""

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.value_head = torch.nn.Linear(model.config.hidden_size, 1, dtype=torch.float32, device=model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and values (B, width) of the answers' tokens; 0 beyond them.

        A token's value is the value of the text before it.
        """
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        attended = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], attended[number, : len(row)] = torch.tensor(row), 1
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device), attention_mask=attended.to(device), output_hidden_states=True, use_cache=False
        )
        logprobs, values = [], []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)  # positions that predict the answer's tokens
            logits = output.logits[number, places].float() / self.temperature
            chosen = torch.tensor(answer, device=device)[:, None]
            rest = (0, width - len(answer))
            logprobs.append(torch.nn.functional.pad(logits.log_softmax(-1).gather(1, chosen)[:, 0], rest))
            hidden = output.hidden_states[-1][number, places].float()
            values.append(torch.nn.functional.pad(self.value_head(hidden)[:, 0], rest))
        return torch.stack(logprobs), torch.stack(values)


class Ppo:
    """One run: the policy to sample from and update, and the rewards."""

    def __init__(
        self, work: Work, asked: PpoSection, tokenizer: Any, rewards: Sequence[Reward], weights: Sequence[float]
    ) -> None:
        self.work, self.asked, self.tokenizer, self.rewards, self.weights = work, asked, tokenizer, rewards, weights
        for module in work.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # probabilities before and after an update are compared
        self.policy = Policy(work.model, self.asked.temperature)
        self.stops = stop_ids(work.model.generation_config)
        if tokenizer.eos_token_id not in self.stops:
            self.stops.append(tokenizer.eos_token_id)
        self.other = work.method.reference()
        settings = work.settings
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        rate, store = settings.learning_rate, store_of(offloading=settings.optimizer_offloading)
        self.adamw = AdamW.named(settings.optim, groups, lr=rate, seed=settings.seed, store=store)
        self.scheduler = get_scheduler(settings.lr_scheduler_type, self.adamw, settings.warmup_steps, settings.max_steps)

    def steps(self, rows: Any, recorder: Recorder) -> None:
        """Run all steps. Raises TrainError if a loss or gradient is NaN or Inf."""
        settings, order = self.work.settings, _order(len(rows), self.work.settings.seed)
        for number in range(1, settings.max_steps + 1):
            drawn = [rows[next(order)] for _ in range(settings.effective_batch_size)]
            recorder.record(*self._step(number, drawn))

    def _step(self, number: int, rows: Sequence[Any]) -> tuple[dict[str, float], tuple[int, int, int], dict[str, float]]:
        """Run one step; returns what to record."""
        answers, cut = self._sample([row["prompt_ids"] for row in rows])
        scores = self._scores(rows, answers)
        known = self._known([row["prompt_ids"] for row in rows], answers)
        rewards = token_rewards(scores, known.logprobs, known.reference, known.mask, self.asked.kl_coef)
        advantages, returns = advantages_of(rewards, known.values, known.mask, self.asked.gamma, self.asked.lam)
        advantages = whiten(advantages, known.mask)
        rate = self.scheduler.get_last_lr()[0]
        updates = [self._update(number, known, advantages, returns) for _ in range(self.asked.num_ppo_epochs)]
        self.scheduler.step()
        tokens = sum(len(row["prompt_ids"]) for row in rows) + sum(map(len, answers))
        labelled = sum(map(len, answers))
        figures = {
            "reward": float(scores.mean()),
            "kl": float(((known.logprobs - known.reference) * known.mask).sum() / len(rows)),
            "completion_length": labelled / len(rows),
            "cut_answers": cut / len(rows),
            "policy_clipped": sum(update[2] for update in updates) / len(updates),
        }
        values = {"loss": updates[0][0], "grad_norm": updates[-1][1], "learning_rate": rate}
        return values, (tokens, tokens, labelled), figures

    def _micro(self, count: int) -> Iterator[slice]:
        size = self.work.settings.per_device_train_batch_size
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _sample(self, prompts: Sequence[list[int]]) -> tuple[list[list[int]], int]:
        """Sampled answers, each with the stop token that ended it, and how many were cut at the maximum length."""
        answers = generate(
            self.work.model,
            prompts,
            stop_ids=self.stops,
            max_new_tokens=self.asked.max_completion_length,
            batch_size=self.work.settings.per_device_train_batch_size,
            temperature=self.asked.temperature,
        )
        return answers, sum(answer[-1] not in self.stops for answer in answers)

    def _scores(self, rows: Sequence[Any], answers: Sequence[list[int]]) -> torch.Tensor:
        """The weighted sum of the rewards of each answer (B,)."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        prompts, references = [json.loads(row["prompt"]) for row in rows], [row["reference"] for row in rows]
        total = torch.zeros(len(rows))
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            total += weight * torch.tensor(list(reward(prompts, texts, references)))
        return total

    @torch.no_grad()
    def _known(self, prompts: list[list[int]], answers: list[list[int]]) -> Answers:
        """What the model before the update, and the reference, predict for the answers."""
        width = max(map(len, answers))
        made: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for part in self._micro(len(answers)):
            logprobs, values = self.policy(prompts[part], answers[part], width)
            made.append((logprobs.cpu(), self._reference(prompts[part], answers[part], width).cpu(), values.cpu()))
        mask = torch.tensor([[float(place < len(answer)) for place in range(width)] for answer in answers])
        logprobs, reference, values = (torch.cat(parts) for parts in zip(*made, strict=True))
        return Answers(prompts, answers, logprobs, reference, values, mask)

    def _reference(self, prompts: list[list[int]], answers: list[list[int]], width: int) -> torch.Tensor:
        plain: AbstractContextManager[Any] = nullcontext() if self.other is not None else self.work.model.disable_adapter()
        kept = self.policy.model
        try:
            self.policy.model = kept if self.other is None else self.other
            with plain:
                logprobs: torch.Tensor = self.policy(prompts, answers, width)[0]
        finally:
            self.policy.model = kept
        return logprobs

    def _update(
        self, number: int, known: Answers, advantages: torch.Tensor, returns: torch.Tensor
    ) -> tuple[float, float, float]:
        """Run one update on all answers; returns the loss, the gradient norm before clipping, the share of clipped tokens."""
        asked, count, device = self.asked, known.mask.sum(), self.work.model.device
        self.work.model.train()
        total = clipped = 0.0
        for part in self._micro(len(known.answers)):
            logprobs, values = self.policy(known.prompts[part], known.answers[part], known.mask.shape[1])
            old, old_values, mask, gain, goal = (
                each[part].to(device) for each in (known.logprobs, known.values, known.mask, advantages, returns)
            )
            loss, cut = policy_loss(logprobs, old, gain, mask, asked.cliprange)
            loss = (loss + asked.vf_coef * value_loss(values, old_values, goal, mask, asked.cliprange_value)) / float(count)
            loss.backward()
            total, clipped = total + float(loss.detach()), clipped + float(cut)
        norm = gradient_norm(self.policy.parameters())
        check_finite(number, total, float(norm))
        torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), self.work.settings.max_grad_norm, norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return total, float(norm), clipped / float(count)


def _order(count: int, seed: int) -> Iterator[int]:
    """Endless row indices: all of them in a seeded order, then all in another one."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(range(count), count)


class PpoLoop(PaddedLoop):
    """Sampled answers, a value head, and clipped updates."""

    def steps(self, recorder: Recorder) -> AbstractContextManager[None]:
        ppo = Ppo(self.work, self.run.recipe.own(PpoSection), self.tokenizer, self.rewards, self.weights)
        ppo.steps(self.rows, recorder)
        return ppo.adamw.unloaded()


LOOP = PpoLoop
