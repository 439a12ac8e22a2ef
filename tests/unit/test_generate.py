"""Batched greedy generation equals one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tunesmith.stages.evaluate.generate import generate


def test_batches_equal_single_prompts(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 40_000, (n,), generator=generator).tolist() for n in (5, 17, 9, 3, 12)]
    seen: list[int] = []
    together = generate(model, prompts, stop_ids=[2], max_new_tokens=8, batch_size=3, on_batch=seen.append)
    alone = [generate(model, [prompt], stop_ids=[2], max_new_tokens=8, batch_size=1)[0] for prompt in prompts]
    assert together == alone
    assert all(len(answer) == 8 for answer in alone)
    assert seen == [3, 5]


def test_answers_end_before_the_stop_token(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    prompts = [[11, 12, 13], [21, 22]]
    free = generate(model, prompts, stop_ids=[2], max_new_tokens=6, batch_size=2)
    stop = free[0][3]
    assert free[0].index(stop) < 6
    stopped = generate(model, prompts, stop_ids=[stop], max_new_tokens=6, batch_size=2)
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stop not in stopped[1]
