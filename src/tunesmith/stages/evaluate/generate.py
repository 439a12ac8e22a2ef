"""Greedy answers to many prompts in batches, the longest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """For each prompt (token ids) the ids of its greedy answer, without the stop id. Order is kept.

    Prompts are padded on the left and told apart by the attention mask, so the pad id does not matter. The longest
    batch comes first: if memory does not suffice, it shows at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(prompts[chosen[0]])
        input_ids = torch.full((len(chosen), longest), stop_ids[0], dtype=torch.long)
        mask = torch.zeros((len(chosen), longest), dtype=torch.long)
        for number, index in enumerate(chosen):
            size = len(prompts[index])
            input_ids[number, longest - size :] = torch.tensor(prompts[index])
            mask[number, longest - size :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
                pad_token_id=stop_ids[0],
                use_cache=True,
            )
        for index, ids in zip(chosen, output[:, longest:].tolist(), strict=True):
            answers[index] = _until_stop(ids, set(stop_ids))
        on_batch(start + len(chosen))
    return answers


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
