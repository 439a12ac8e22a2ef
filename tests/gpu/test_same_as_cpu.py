"""A GPU computes the same as the CPU: loss, gradients, 4-bit weights, updates."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS, VOCABULARY, loss_and_gradients
from tunesmith.engine.attention import flex
from tunesmith.engine.attention.tree import masked_attention, tree_attention
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.checkpointing import enable_checkpointing
from tunesmith.engine.optim.adamw import AdamW
from tunesmith.engine.optim.sizes import STATE_BITS
from tunesmith.engine.packing.batch import collate_tree, to_device
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import build_tree
from tunesmith.kernels.liger import liger
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.building import build_model

Rows = list[dict[str, Any]]


def branching_rows(shared: int = 150, longest: int = 90) -> Rows:
    """Rows that share an instruction over several blocks of flex attention, and one row that shares nothing."""
    stem = [1 + (7 * place) % (VOCABULARY - 1) for place in range(shared)]
    endings = [[1 + branch] * 9 + [1 + (branch * place) % 50 for place in range(10 * branch, longest)] for branch in range(5)]
    rows = [stem + ending for ending in endings]
    rows.append([3 + (11 * place) % 50 for place in range(77)])
    return [{"input_ids": ids, "loss_mask": [place > shared // 2 for place in range(len(ids))]} for ids in rows]


def on(device: torch.device, model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients on the device, to which the model is moved; the layout's masks are rebuilt."""
    fresh = {**batch, "tree_layout": Layout(batch["tree_layout"].nodes, batch["tree_layout"].length)}
    for module in model.to(device).modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.to(device)
    loss, found = loss_and_gradients(model, to_device(fresh, device), tree=True)
    return loss, {name: gradient.cpu() for name, gradient in found.items()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    """Compare each gradient, relative to the largest element of its own tensor."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((found[name] - gradient).abs().max()) <= within * scale, name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [branching_rows(), branching_rows()[:1]], ids=["tree", "one row"])
def test_loss_and_gradients_of_each_architecture(device: torch.device, name: str, rows: Rows) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.max_position_embeddings = 512
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fuse_blocks(model)
    batch = collate_tree(rows)
    expected_loss, expected = on(torch.device("cpu"), model, batch)
    found_loss, found = on(device, model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    close(found, expected, 1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_get_the_same_gradients(device: torch.device, method: Any) -> None:
    """The same adapter and the same 4-bit weights on both sides."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.max_position_embeddings, config.hidden_size, config.intermediate_size, config.head_dim = 512, 64, 128, 16
    torch.manual_seed(0)
    scenario = Scenario(method, rows=1, length=300, labelled=100, dtype="float32", attention="tree")
    model = build_model(config, scenario, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    batch = collate_tree(branching_rows())
    expected_loss, expected = on(torch.device("cpu"), model, batch)
    found_loss, found = on(device, model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    close(found, expected, 1e-4)


def test_four_bit_weights_are_the_same(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 192, dtype=torch.bfloat16)
    made = [quantize_4bit(weight.to(where), compress_statistics=True, quant_type="nf4") for where in ("cpu", device)]
    packed = [quantised.cpu() for quantised, _ in made]
    assert torch.equal(*packed)
    values = [dequantize_4bit(*each).cpu().float() for each in made]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("optim", STATE_BITS)
def test_updates_of_each_optimizer(device: torch.device, optim: str) -> None:
    """A bf16 weight after a few updates: equal to one bf16 step, or with stochastic rounding to a few steps."""
    torch.manual_seed(0)
    start, gradients = torch.randn(300, 40), [torch.randn(300, 40) for _ in range(3)]
    results = []
    for where in (torch.device("cpu"), device):
        parameter = torch.nn.Parameter(start.to(where, torch.bfloat16))
        optimizer = AdamW.named(optim, [parameter], lr=1e-2, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.to(where, torch.bfloat16)
            optimizer.step()
        results.append(parameter.detach().float().cpu())
    spacing = start.abs().clamp_min(0.1) / 128  # of bf16 values near it
    apart = (results[0] - results[1]).abs() / spacing
    most = {"adamw": 1.0, "adamw_kahan": 1.0}.get(optim, 4.0)
    assert float(apart.max()) <= most + 0.01
    assert float(apart.mean()) <= {"adamw": 0.001, "adamw_kahan": 0.01}.get(optim, 1.0)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("optim", STATE_BITS)
def test_states_in_the_machines_memory_give_the_same_bits(device: torch.device, optim: str) -> None:
    torch.manual_seed(0)
    start, gradients, results = torch.randn(3000, 40), [torch.randn(3000, 40) for _ in range(3)], []
    for store in (None, torch.device("cpu")):
        parameter = torch.nn.Parameter(start.to(device, torch.bfloat16))
        optimizer = AdamW.named(optim, [parameter], lr=1e-2, store=store)
        for gradient in gradients:
            parameter.grad = gradient.to(device, torch.bfloat16)
            optimizer.step()
        kept = {tensor.device.type for name, tensor in optimizer.kept({parameter: "p"}).items() if "exp_avg" in name}
        assert kept == {device.type if store is None else "cpu"}
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_with_kernels_of_liger(gpu: torch.device, name: str) -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).train()
    batch = collate_tree(branching_rows())
    fuse_blocks(model)
    loss, expected = on(gpu, model, batch)
    fuse_blocks(model, liger(gpu))
    again, found = on(gpu, model, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    close(found, expected, 1e-4)


@pytest.mark.parametrize("rows", [branching_rows(), branching_rows()[:1]], ids=["tree", "one row"])
def test_gradients_with_attention_kept(device: torch.device, rows: Rows) -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).train()
    batch = collate_tree(rows)
    _, expected = on(device, model, batch)
    enable_checkpointing(model, "keep_attention")
    _, found = on(device, model, batch)
    close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_runs_and_equals_the_dense_mask(gpu: torch.device, dtype: torch.dtype) -> None:
    assert flex.unsupported_reason(gpu, dtype) is None
    tree = build_tree([row["input_ids"] for row in branching_rows(400, 300)])
    layout = Layout(tree.nodes, len(tree.ids))
    assert len(tree.nodes) > 3
    torch.manual_seed(0)
    query = torch.randn((1, 8, layout.length, 64), device=gpu, dtype=dtype, requires_grad=True)
    key, value = (torch.randn((1, 2, layout.length, 64), device=gpu, dtype=dtype, requires_grad=True) for _ in range(2))
    found = tree_attention(None, query, key, value, None, scaling=0.2, tree_layout=layout)[0].transpose(1, 2)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = masked_attention(*exact, Layout(tree.nodes, len(tree.ids)), 0.2)
    direction = torch.randn_like(found)
    one = torch.autograd.grad((found * direction).sum(), (query, key, value))
    two = torch.autograd.grad((expected * direction.double()).sum(), exact)
    within = 1e-5 if dtype == torch.float32 else 2e-2
    for left, right in zip((found, *one), (expected, *two), strict=True):
        assert float((left.double() - right).abs().max()) <= within * max(1.0, float(right.abs().max()))
