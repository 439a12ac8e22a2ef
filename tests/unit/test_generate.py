"""Batched generation equals one prompt at a time, and transformers' output; sampling draws from the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS
from tunesmith.inference.decode import decode, decode_attention, sampled, sharing_unsupported_reason
from tunesmith.inference.generate import generate, without_stop


def test_batches_equal_single_prompts(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 2_000, (n,), generator=generator).tolist() for n in (5, 17, 9, 3, 12)]
    seen: list[int] = []
    together = generate(model, prompts, stop_ids=[2], max_new_tokens=8, batch_size=3, on_batch=seen.append)
    alone = [generate(model, [prompt], stop_ids=[2], max_new_tokens=8, batch_size=1)[0] for prompt in prompts]
    assert together == alone
    assert all(len(answer) == 8 for answer in alone)
    assert seen == [3, 5]


def test_answers_end_with_the_stop_token(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    prompts = [[11, 12, 13], [21, 22]]
    free = generate(model, prompts, stop_ids=[2], max_new_tokens=6, batch_size=2)
    stop = free[0][3]
    assert free[0].index(stop) < 6
    stopped = generate(model, prompts, stop_ids=[stop], max_new_tokens=6, batch_size=2)
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert without_stop(stopped[0], [stop]) == stopped[0][:-1]
    assert stop not in stopped[1]
    assert without_stop(stopped[1], [stop]) == stopped[1]


def float64_model(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).double().eval()


def alike(shared: int) -> list[list[int]]:
    """Prompts of different lengths that start with the same `shared` ids."""
    generator = torch.Generator().manual_seed(1)
    prefix, *rests = (torch.randint(3, 60, (n,), generator=generator).tolist() for n in (shared, 1, 7, 3, 5))
    return [prefix + rest for rest in rests]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared", [0, 1, 12])
def test_a_shared_prefix_changes_no_answer(name: str, shared: int) -> None:
    """Including rows that end at different steps: two of the generated ids are used as stop ids."""
    model, prompts = float64_model(name), alike(shared)
    free = [transformers_answer(model, prompt, [0]) for prompt in prompts]
    stops = [free[0][2], free[1][5]]
    expected = [transformers_answer(model, prompt, stops) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    before = model.config._attn_implementation
    assert decode(model, prompts, shared, stop_ids=stops, max_new_tokens=9) == expected
    assert model.config._attn_implementation == before
    assert generate(model, prompts, stop_ids=stops, max_new_tokens=9, batch_size=4) == expected
    assert generate(model, prompts, stop_ids=stops, max_new_tokens=9, batch_size=4, temperature=1e-6) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_sampled_is_drawn_from_the_models_logits(name: str) -> None:
    model, prompts = float64_model(name), alike(12)
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> list[int]:
        seen.append(logits)
        return sampled(0.7)(logits)

    torch.manual_seed(3)
    answers = decode(model, prompts, 12, stop_ids=list(range(20)), max_new_tokens=9, choose=choose)
    assert len({len(answer) for answer in answers}) > 1
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        row = prompts.index(prompt)
        for step, logits in enumerate(expected):
            alive = [number for number, other in enumerate(answers) if len(other) > step]
            torch.testing.assert_close(seen[step][alive.index(row)], logits, rtol=1e-9, atol=1e-9)


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn = torch.tensor(sampled(2.0)(logits.expand(40_000, -1)))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), rtol=0, atol=0.01)


def transformers_answer(model: Any, prompt: list[int], stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=stops, pad_token_id=0)
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer


def test_a_prefix_goes_through_once(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    sizes: list[int] = []
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0].numel()))
    prompts = [[*range(100, 150), 7 + number] for number in range(6)]
    generate(model, prompts, stop_ids=[2], max_new_tokens=3, batch_size=6)
    assert sizes == [50, 6, 6, 6]


def test_what_would_not_be_greedy_alone_goes_through_transformers(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    assert sharing_unsupported_reason(model, 100) is None
    prompts = [[11, 12, 13, 14, 11, 12], [11, 12, 21]]
    plain = generate(model, prompts, stop_ids=[2], max_new_tokens=8, batch_size=2)
    model.generation_config.repetition_penalty = 1.8
    assert "repetition_penalty" in str(sharing_unsupported_reason(model, 100))
    assert generate(model, prompts, stop_ids=[2], max_new_tokens=8, batch_size=2) != plain
    with pytest.raises(ValueError, match="decode_places"):
        decode_attention(None, *(torch.ones(1, 1, 1, 2) for _ in range(3)), None)
