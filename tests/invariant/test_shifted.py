"""Shifted sparse attention equals a dense mask built from the paper's definition, and never attends to a later token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tunesmith.engine.attention.shifted import ShiftedCollator, shifted_attention
from tunesmith.errors import RecipeError
from tunesmith.runs import create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

GROUP = 8
TRAINING, EVALUATING = SimpleNamespace(training=True), SimpleNamespace(training=False)


def inputs(length: int, heads: int = 4, shared: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(length)
    sizes = ((2, heads, length, 6), (2, shared, length, 6), (2, shared, length, 6))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Head by head: group floor(i / G), or in the second half of the heads floor((i - G / 2) / G), and never a later token."""
    places = torch.arange(query.shape[2])
    outputs = []
    for head in range(query.shape[1]):
        shift = 0 if head < query.shape[1] // 2 else GROUP // 2
        groups = torch.div(places - shift, GROUP, rounding_mode="floor")
        seen = (groups[:, None] == groups[None]) & (places[:, None] >= places[None])
        of = head * key.shape[1] // query.shape[1]
        scores = query[:, head] @ key[:, of].transpose(1, 2) / query.shape[-1] ** 0.5
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[:, of])
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12, 13, 16, 20, 31])
def test_equals_the_dense_reference_with_gradients(length: int) -> None:
    mine, theirs = inputs(length), inputs(length)
    found, _ = shifted_attention(TRAINING, *mine, None, shifted_group=GROUP)
    wanted = dense(*theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    query, key, value = (each.detach() for each in inputs(20))
    before, _ = shifted_attention(TRAINING, query, key, value, None, shifted_group=GROUP)
    for place in range(20):
        changed = [each.clone() for each in (query, key, value)]
        for each in changed:
            each[:, :, place] += 1
        after, _ = shifted_attention(TRAINING, *changed, None, shifted_group=GROUP)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place], after[:, place])


def test_the_shift_carries_across_groups_and_evaluation_is_full() -> None:
    query, key, value = (each.detach() for each in inputs(16))
    other = value.clone()
    other[:, :, 7] += 1  # the last token of the first group
    for module, heads in ((TRAINING, [False, False, True, True]), (EVALUATING, [True] * 4)):
        one, _ = shifted_attention(module, query, key, value, None, shifted_group=GROUP)
        two, _ = shifted_attention(module, query, key, other, None, shifted_group=GROUP)
        assert [not torch.equal(one[:, 8, head], two[:, 8, head]) for head in range(4)] == heads


def test_what_is_not_exact_is_refused() -> None:
    query, key, value = inputs(8)
    for more in ({"shifted_group": None}, {"shifted_group": GROUP, "dropout": 0.1}):
        with pytest.raises(ValueError, match="shifted sparse attention"):
            shifted_attention(TRAINING, query, key, value, None, **more)
    rows = [{"input_ids": [1] * n, "loss_mask": [True] * n} for n in (3, 5)]
    batch = ShiftedCollator(0, GROUP)(rows)
    assert batch["shifted_group"] == GROUP
    assert "attention_mask" not in batch


def test_trains_with_it_and_the_group_matters(make_recipe: Any, tmp_path: Path) -> None:
    losses = {}
    for group in (None, 8, 2048):
        more = {"train__shifted_sparse_attention": group, "train__compute_dtype": "float32", "train__max_steps": 2}
        run = create_run(make_recipe(train__packing=group is not None, **more), tmp_path / str(group))
        prepare(run)
        train(run, Console(quiet=True))
        losses[group] = [line["loss"] for line in read_jsonl(run.path / "train" / "metrics.jsonl")]
        told = [event["code"] for event in run.events("train") if event["code"] != "setting"]
        assert told == ([] if group is None else ["packing-off"])
    assert losses[2048] == pytest.approx(losses[None], rel=1e-5)  # rows shorter than half a group: one group, full attention
    assert losses[8] != pytest.approx(losses[None], rel=1e-5)


def test_an_architecture_without_proof_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(make_recipe().recipe.model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    OlmoForCausalLM(OlmoConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "olmo")
    tokenizer.save_pretrained(tmp_path / "olmo")
    run = create_run(make_recipe(model=str(tmp_path / "olmo"), train__shifted_sparse_attention=8), tmp_path / "run")
    prepare(run)
    with pytest.raises(RecipeError, match="shifted_sparse_attention"):
        train(run, Console(quiet=True))
