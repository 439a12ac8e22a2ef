"""The fused adapter computes the same as PEFT's layers, and its weights stay PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from tunesmith.engine.modeling.adapter import base_weight, fuse_adapters


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 16)
        self.second = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(dropout: float = 0.0, **config: Any) -> tuple[Any, Any]:
    """The same adapted model twice: with PEFT's forward, and fused; B is not zero, so both parts count."""
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], lora_dropout=dropout, **config)
    theirs = get_peft_model(Two().double(), wanted, autocast_adapter_dtype=False).double().train()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    mine = copy.deepcopy(theirs)
    fuse_adapters(mine)
    return theirs, mine


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_values_and_gradients_equal_pefts(use_rslora: bool, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 with a custom kernel if there is one; in float64 with torch's operators."""
    theirs, mine = pair(use_rslora=use_rslora)
    mine.to(dtype)
    near = {"rtol": tolerance, "atol": tolerance}
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    inputs = [x.clone().to(given).requires_grad_() for given in (torch.float64, dtype)]
    results = [model(value) for model, value in zip((theirs, mine), inputs, strict=True)]
    torch.testing.assert_close(results[1].double(), results[0], **near)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad.double(), inputs[0].grad, **near)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(wanted) == 4
    for name, parameter in mine.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad.double(), wanted[name], **near)
    mine.zero_grad()
    mine(inputs[1].detach()).square().sum().backward()  # like the first block, whose input needs no gradient
    for name, parameter in mine.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad.double(), wanted[name], **near)


def test_dropout_draws_as_peft_does() -> None:
    theirs, mine = pair(dropout=0.5)
    x = torch.randn(3, 24, dtype=torch.float64)
    results = []
    for model in (theirs, mine):
        torch.manual_seed(7)
        value = x.clone().requires_grad_()
        result = model(value)
        result.square().sum().backward()
        results.append((result.detach(), value.grad, *(p.grad for p in model.parameters() if p.requires_grad)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # No dropout outside training.
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_bf16_model_with_float32_adapters_saves_bf16_only() -> None:
    theirs, mine = pair()
    mine.base_model.model.to(torch.bfloat16)
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(5, 24)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = mine(x.bfloat16())
    result.float().square().sum().backward()
    parameters = {parameter.data_ptr() for parameter in mine.parameters()}
    assert {t.dtype for t in saved if t.data_ptr() not in parameters and t.dim() > 1} == {torch.bfloat16}
    trained = [p for p in mine.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 for p in trained)
    expected = theirs(x.double())
    torch.testing.assert_close(result.double(), expected, rtol=0.05, atol=0.1)


def test_four_bit_weight_is_dequantised() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    _ = layer(torch.zeros(1, 128))  # quantises
    made = base_weight(layer, torch.float32)
    assert made.shape == weight.shape
    x = torch.randn(3, 128)
    torch.testing.assert_close(x @ made.T, layer(x), rtol=1e-4, atol=1e-4)


def test_switched_off_adapter_gives_the_base() -> None:
    theirs, mine = pair()
    x = torch.randn(3, 24, dtype=torch.float64)
    with theirs.disable_adapter(), mine.disable_adapter():
        torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=0)
    assert not torch.allclose(
        mine(x), mine.get_base_model().second.get_base_layer()(torch.tanh(mine.base_model.first.get_base_layer()(x)))
    )
