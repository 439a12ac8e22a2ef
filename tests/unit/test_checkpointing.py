"""Recomputed blocks: bit-identical gradients, and attention runs once if its result is kept."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS
from tests.support.recipes import GOOD, problems
from tunesmith.engine.attention import flex, tree
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.checkpointing import ATTENTION, enable_checkpointing, settings
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import PaddedCollator, collate_tree
from tunesmith.recipe import Checkpointing

ROWS = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, last], "loss_mask": [False] * 4 + [True] * 6} for last in (10, 11)]
LAYERS = CONFIGS["llama"].num_hidden_layers


class _Counted(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def step(checkpointing: Checkpointing, *, packed: bool) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients, and the operators called to compute them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).train()
    fuse_blocks(model)
    use_tree_attention(model, on=packed)
    enable_checkpointing(model, checkpointing)
    batch = collate_tree(ROWS) if packed else PaddedCollator(0)(ROWS)
    with _Counted() as counted:
        summed_loss(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, counted.calls


@pytest.mark.parametrize("own", [True, False], ids=["own kernel", "torch's kernel"])
@pytest.mark.parametrize(
    ("packed", "operator"),
    [(True, "tunesmith::tree_attention"), (False, "aten::_scaled_dot_product_flash_attention_for_cpu")],
    ids=["packed", "padded"],
)
def test_gradients_are_the_same_bits(packed: bool, operator: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.setattr(tree, "has_own_kernel", lambda _: False)
    assert operator in ATTENTION
    wanted, plain = step(checkpointing=False, packed=packed)
    for asked, times in ((True, 2), ("keep_attention", 1)):
        found, calls = step(asked, packed=packed)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert plain[operator] == LAYERS
        assert calls[operator] == times * LAYERS
        assert calls["aten::mm"] > plain["aten::mm"]  # the matmuls are recomputed in any case


def test_what_is_compiled_as_flex_attention_is_computed_once() -> None:
    """Flex attention has no backward pass on CPUs; matmuls and a softmax replace it."""

    def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = (query @ key.mT * 0.3).softmax(-1) @ value
        return mixed

    compiled = torch.compile(mix, **flex.COMPILED)
    weight, x = torch.randn(64, 192, requires_grad=True), torch.randn(2, 128, 64, requires_grad=True)
    made: list[torch.Tensor] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        made.append(compiled(*(each.contiguous() for each in (x @ weight).chunk(3, -1))))
        return made[-1].sin()

    wanted = torch.autograd.grad(block(x).square().sum(), [x, weight])
    made.clear()
    found = torch.autograd.grad(checkpoint(block, x, **settings("keep_attention")).square().sum(), [x, weight])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    before, again = (each.data_ptr() for each in made)
    assert before == again


def test_what_keeps_attention_has_an_attention_to_keep() -> None:
    (what,) = problems(GOOD + "train: {gradient_checkpointing: keep_attention, attn_implementation: eager}")
    assert "no single output to keep" in what
    (what,) = problems(GOOD + "train: {gradient_checkpointing: attention}")
    assert "'keep_attention'" in what
