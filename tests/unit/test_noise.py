"""NEFTune's noise: the paper's scale for each row's own length, in a tree too, and only in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.modeling.noise import EmbeddingNoise, row_lengths
from tunesmith.engine.packing.batch import Batch, Collator, PaddedCollator, collate_tree

SHARED = list(range(1, 21))
ROWS = [{"input_ids": SHARED + [30 + n] * more, "loss_mask": [False] * 20 + [True] * more} for n, more in ((0, 5), (1, 44))]
ALPHA = 5.0


def added(collate: Collator, *, train: bool) -> tuple[torch.Tensor, Batch]:
    """The noise added to the embeddings of a batch, (B, L, H)."""
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).train(train)
    batch = collate(ROWS)
    use_tree_attention(model, on="tree_layout" in batch)
    seen: list[torch.Tensor] = []
    EmbeddingNoise(model, ALPHA)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    summed_loss(model, batch)
    return seen[0] - model.get_input_embeddings().weight[batch["input_ids"]].detach(), batch


@pytest.mark.parametrize("collate", [collate_tree, PaddedCollator(0)], ids=["tree", "padded"])
def test_noise_is_as_large_as_each_rows_length_says(collate: Collator) -> None:
    noise, batch = added(collate, train=True)
    reach = ALPHA / (row_lengths(batch) * noise.shape[-1]).sqrt()
    assert bool((noise.abs() <= reach.unsqueeze(-1) * 1.001).all())
    # A uniform variable's standard deviation is its range limit divided by sqrt(3).
    torch.testing.assert_close(noise.std(-1).mean(), (reach / 3**0.5).mean(), rtol=0.1, atol=0)
    lengths = row_lengths(batch)
    assert lengths[0, 0] == (63 if "tree_layout" in batch else 24)  # the last label does not go through the model
    assert sorted(set(lengths.flatten().tolist())) == [24, 63]


def test_nothing_is_added_in_eval_mode() -> None:
    noise, _ = added(collate_tree, train=False)
    assert not noise.any()


def test_hooks_come_off() -> None:
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).train()
    use_tree_attention(model, on=True)
    batch = collate_tree(ROWS)
    plain = summed_loss(model, batch)
    noise = EmbeddingNoise(model, 50.0)
    assert not torch.isclose(summed_loss(model, batch), plain)
    noise.remove()
    assert torch.equal(summed_loss(model, batch), plain)
