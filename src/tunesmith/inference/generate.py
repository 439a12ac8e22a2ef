"""Answers to many prompts in batches, the longest first: greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from tunesmith.engine.packing.tree import shared_length
from tunesmith.inference.decode import decode, likeliest, sampled, sharing_unsupported_reason


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """For each prompt (token ids) the ids of its answer, including the stop id that ended it. Order is kept.

    Greedy, or sampled from the softmax of logits / `temperature`. The prefix that the prompts of a batch share goes through the
    model once if that is exact (`decode.sharing_unsupported_reason`). The longest batch runs first, so that running out of
    memory shows immediately.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    model.eval()
    longest = max(map(len, prompts), default=0) + max_new_tokens
    answer = _padded if sharing_unsupported_reason(model, longest) else _sharing
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = answer(model, [prompts[index] for index in chosen], stop_ids, max_new_tokens, temperature)
        for index, ids in zip(chosen, found, strict=True):
            answers[index] = ids[: _end(ids, stop_ids) + 1]
        on_batch(start + len(chosen))
    return answers


def without_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """The ids before the first stop id."""
    return ids[: _end(ids, stop_ids)]


def _end(ids: Sequence[int], stop_ids: Collection[int]) -> int:
    return next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))


def _sharing(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, temperature: float | None
) -> list[list[int]]:
    shared = min(shared_length(prompts[0], prompt) for prompt in prompts)
    shared = min(shared, *(len(prompt) - 1 for prompt in prompts)) if len(prompts) > 1 else 0
    choose = likeliest if temperature is None else sampled(temperature)
    return decode(model, prompts, shared, stop_ids=stop_ids, max_new_tokens=max_new_tokens, choose=choose)


def _padded(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, temperature: float | None
) -> list[list[int]]:
    """Generates with transformers. Prompts are left-padded under an attention mask, so the pad id does not matter."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), stop_ids[0], dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for number, prompt in enumerate(prompts):
        input_ids[number, longest - len(prompt) :] = torch.tensor(prompt)
        mask[number, longest - len(prompt) :] = 1
    drawn: dict[str, Any] = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=temperature is not None,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
        **drawn,
    )
    made: list[list[int]] = output[:, longest:].tolist()
    return made
