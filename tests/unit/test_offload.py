"""Offloaded activations: bit-identical gradients, and only activations are moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS
from tests.support.recipes import CPU, recipe
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.checkpointing import enable_checkpointing
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.modeling.offload import ActivationOffload
from tunesmith.engine.packing.batch import collate_tree
from tunesmith.errors import RecipeError
from tunesmith.methods.settings import settle
from tunesmith.recipe import Checkpointing

ROWS = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, last], "loss_mask": [False] * 4 + [True] * 6} for last in (10, 11)]


def gradients(model: Any, offload: ActivationOffload | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = collate_tree(ROWS)
    if offload is None:
        loss = summed_loss(model, batch)
    else:
        with offload:
            loss = summed_loss(model, batch)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True, "keep_attention"])
def test_gradients_are_the_same_bits(checkpointing: Checkpointing) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).train()
    fuse_blocks(model)
    use_tree_attention(model, on=True)
    enable_checkpointing(model, checkpointing)
    offload = ActivationOffload(model, smallest=1, always=True)
    wanted, found = gradients(model, None), gradients(model, offload)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert offload.offloaded_bytes > 0


def test_only_large_activations_of_another_device_travel() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    offload = ActivationOffload(layer, smallest=1, always=True)
    with offload:
        layer(x).tanh().sum().backward()
    assert offload.offloaded_bytes == 2 * x.numel() * 4  # x and the result of tanh; not the weight, which is saved too
    for quiet in (ActivationOffload(layer, smallest=1), ActivationOffload(layer, always=True)):
        with quiet:
            layer(x).tanh().sum().backward()
        assert quiet.offloaded_bytes == 0


@pytest.mark.parametrize("name", ["activation_offloading", "optimizer_offloading"])
def test_a_cpu_has_nowhere_to_offload_to(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} without a GPU"):
        settle(recipe(**{name: "true"}), 5_000, CPU)
