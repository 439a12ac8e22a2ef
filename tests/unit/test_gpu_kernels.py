"""GPU kernels match the formulas, in Triton's interpreter, which needs no GPU; tests/gpu runs them compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tunesmith.kernels import triton

BEGIN = """
import json, os
os.environ["TRITON_INTERPRET"] = "1"
import torch

def apart(pairs):
    return max(float(((a.float() - b.float()).abs() / (b.float().abs() + 1)).max()) for a, b in pairs)
"""

BLOCKS = """
import copy
from transformers import AutoModelForCausalLM
from tests.support.models import CONFIGS
from tunesmith.kernels import triton
from tunesmith.kernels.triton import blocks, cross_entropy, trial
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.kernels.dispatch import EAGER, OWN
from tunesmith.engine.packing.batch import collate_tree
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import summed_loss

found = {"trial": trial.wrong(torch.device("cpu"))}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    pairs = []
    for size in (48, 1500):
        x, up, gradient = (torch.randn(2, 5, size).to(dtype) for _ in range(3))
        weight = torch.randn(size).to(dtype)
        for offset in (0.0, 1.0):
            out, root = EAGER.norm(x, weight, 1e-5, offset)
            pairs += zip(blocks.norm(x, weight, 1e-5, offset), (out, root))
            for of_weight in (True, False):
                given = (gradient, x, root, weight, offset, of_weight)
                one, two = blocks.norm_backward(*given), EAGER.norm_backward(*given)
                assert (one[1] is None) == (two[1] is None) == (not of_weight)
                pairs += [pair for pair in zip(one, two) if pair[1] is not None]
        pairs.append((blocks.gated(x, up), EAGER.gated(x, up, "silu")))
        pairs += zip(blocks.gated_backward(gradient, x, up), EAGER.gated_backward(gradient, x, up, "silu"))
    for batch, turns in ((2, 2), (2, 1), (1, 1)):
        heads = torch.randn(batch, 7, 3, 24).to(dtype).transpose(1, 2)  # (B, A, L, D) as projections leave it
        cos, sin = (torch.randn(turns, 1, 7, 24).to(dtype) for _ in range(2))
        for backwards in (False, True):
            pairs.append((blocks.rotary(heads, cos, sin, backwards), EAGER.rotary(heads, cos, sin, backwards)))
            assert pairs[-1][0].stride() == heads.stride()
    for places, width in ((5, 60), (3, 20_000)):  # one block of a row's logits, and several
        logits, weights = (4 * torch.randn(places, 2 * width)).to(dtype)[:, :width], torch.rand(places)
        targets = torch.randint(width, (places,))
        exact = logits.float().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        gradients = torch.autograd.grad((expected * weights).sum(), exact)[0]
        before = logits.clone()
        pairs.append((cross_entropy.from_logits(logits, targets, None), expected.detach()))
        assert torch.equal(logits, before)
        pairs.append((cross_entropy.from_logits(logits, targets, weights), expected.detach()))
        pairs.append((logits * 100, gradients * 100))
    assert cross_entropy.from_logits(logits[:0], targets[:0], None).shape == (0,)
    found[str(dtype)] = apart(pairs)
    nothing = x[:, :0]
    assert blocks.norm(nothing, weight, 1e-5, 0.0)[0].shape == blocks.gated(nothing, nothing).shape == nothing.shape

def gradients(kernels, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).train()
    fuse_blocks(model, kernels)
    use_tree_attention(model, on=True)
    summed_loss(model, collate_tree([{"input_ids": list(range(1, 20)), "loss_mask": [True] * 19}])).backward()
    return torch.cat([each.grad.flatten() for each in model.parameters()])

for name in ("qwen3", "gemma"):  # a norm of each head; what a norm adds to its weight, and an activation without a kernel
    expected = gradients(EAGER, name)
    triton.computes, calls = lambda *tensors: calls.append(1) or True, []
    made = gradients(OWN, name)
    assert calls
    found[name] = float((made - expected).norm() / expected.norm())
print(json.dumps(found))
"""

UPDATES = """
from dataclasses import replace

from tunesmith.kernels.triton.adamw import STATE_BLOCK, Moment, Step, update
from tunesmith.engine.optim import sizes
from tunesmith.engine.optim.adamw import _VALUES, AdamW
from tunesmith.engine.optim.rounding import join_halves

assert STATE_BLOCK == sizes.STATE_BLOCK
COUNT = 1300

def moments(state):
    kept = [state[name] for name in ("exp_avg", "exp_avg_sq")]
    return tuple(Moment(each.values, each.scales, each.code) for each in kept)

def trained(bits, dtype, parts, compensated=False, clip=None, seed=0):
    # Three updates, by the kernel in so many parts, or with parts=0 by the slices of AdamW.
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(COUNT).bfloat16().to(dtype))
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1, bits=bits, compensated=compensated, seed=seed)
    for number in range(1, 4):
        parameter.grad = (number * torch.randn(COUNT)).bfloat16().to(dtype)
        limit = None if clip is None else (torch.linalg.vector_norm(parameter.grad.float()), clip)
        if not parts:
            optimizer.update(parameter, optimizer.param_groups[0], limit)
            continue
        state = optimizer._state_of(parameter)
        step = Step(1e-2, (0.9, 0.999), 1e-8, 0.1, number, seed * 100 + number)
        size = -(-COUNT // parts // 256) * 256
        for begin in range(0, COUNT, size):
            part, blocks = slice(begin, begin + size), slice(begin // 256, -(-min(begin + size, COUNT) // 256))
            cut = [replace(m, values=m.values[part], scales=None if bits == 16 else m.scales[blocks]) for m in moments(state)]
            low = state["compensation"][part] if compensated else None
            update(parameter.detach()[part], parameter.grad[part], tuple(cut), step, low, limit, first=begin)
    return parameter.detach(), optimizer._state_of(parameter)

found = {}
for bits in (8, 16):
    found[f"float32 {bits}"] = apart([(trained(bits, torch.float32, 1)[0], trained(bits, torch.float32, 0)[0])])
    found[f"bfloat16 {bits}"] = apart([(trained(bits, torch.bfloat16, 1)[0], trained(bits, torch.bfloat16, 0)[0])])
found["clipped"] = apart([(trained(16, torch.float32, 1, clip=0.5)[0], trained(16, torch.float32, 0, clip=0.5)[0])])
found["unclipped"] = apart([(trained(16, torch.float32, 1, clip=0.5)[0], trained(16, torch.float32, 1)[0])])
weight, state = trained(16, torch.bfloat16, 1, compensated=True)
whole = trained(16, torch.float32, 0)[0]
found["compensated"] = apart([(join_halves(weight, state["compensation"]), whole)])
found["halves"] = float((weight != whole.bfloat16()).float().mean())
for bits, compensated in ((8, False), (16, False), (16, True)):
    (one, first), (two, second) = (trained(bits, torch.bfloat16, parts, compensated) for parts in (1, 3))
    assert torch.equal(one, two), "slices"
    assert all(torch.equal(a.values, b.values) for a, b in zip(moments(first), moments(second)))
many = torch.stack([trained(16, torch.bfloat16, 1, seed=seed)[0].float() for seed in range(40)])
found["differ"] = float((many[0] != many[1]).float().mean())
found["bias"] = float((many.abs().mean(0) - whole.abs()).mean().abs())
# Shares of every decade, at values of bytes, and beside the middles between two; each block has a one.
codes = [torch.tensor(_VALUES[signed]) for signed in (True, False)]
middles = [(code[1:] + code[:-1]) / 2 for code in codes]
roots = [codes[1].sqrt(), middles[1].sqrt() * 0.9995, middles[1].sqrt() * 1.0005]
every = [codes[0], middles[0] * 0.999, middles[0] * 1.001, *roots]
every.append(10 ** torch.linspace(-8, 0, 4000) * (1 - 2 * (torch.arange(4000) % 2)))
shares = torch.cat(every)
gradient = torch.cat([torch.cat([part, torch.ones(256 - len(part))]) for part in shares.split(255)])
parameter = torch.nn.Parameter(torch.zeros_like(gradient))
kept = moments(AdamW([parameter], bits=8)._state_of(parameter))
update(parameter.detach(), gradient, kept, Step(1e-2, (0.0, 0.0), 1e-8, 0.0, 1, 0))
apart = [kept[0].code[kept[0].values.int()] - gradient, kept[1].code[kept[1].values.int()] - gradient.square()]
best = [(gradient[:, None] - codes[0]).abs().amin(1), (gradient.square()[:, None] - codes[1]).abs().amin(1)]
found["not nearest"] = sum(int((one.abs() > two * (1 + 1e-3) + 1e-12).sum()) for one, two in zip(apart, best))
found["bytes"] = [len(set(each.values.tolist())) for each in kept]
print(json.dumps(found))
"""


def interpreted(script: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_trial_of_all_kernels_finds_nothing_wrong() -> None:
    """The trial compares each kernel with its formula before a training uses it; here in the interpreter."""
    script = "from tunesmith.kernels.triton import trial\nprint(json.dumps({'wrong': trial.wrong(torch.device('cpu'))}))"
    assert interpreted(script) == {"wrong": None}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_block_kernels_are_the_formulas() -> None:
    found = interpreted(BLOCKS)
    assert found["trial"] is None
    assert found["torch.float32"] < 5e-6
    assert found["torch.bfloat16"] < 0.02  # the formulas round after each operator, the kernels once
    assert found["qwen3"] < 1e-5
    assert found["gemma"] < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_updates_are_those_of_the_optimizer() -> None:
    """Equal up to rounding; stochastic rounding keeps the mean; slices and the whole give the same bits."""
    found = interpreted(UPDATES)
    assert found["float32 8"] < 1e-3
    assert found["float32 16"] < 1e-3
    assert found["clipped"] < 1e-3 < found["unclipped"]
    assert max(found["bfloat16 8"], found["bfloat16 16"]) < 0.03
    assert found["compensated"] < 1e-3
    assert found["halves"] < 0.1  # weights that are not the nearest bf16 value: states are rounded stochastically
    assert 0.1 < found["differ"] < 0.9
    assert found["bias"] < 2e-4
    assert found["not nearest"] == 0
    assert found["bytes"] == [256, 256]


def test_a_cpu_has_none() -> None:
    assert "cpu" in str(triton.unsupported_reason(torch.device("cpu")))
    assert not triton.computes(torch.ones(3))


def test_they_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_TRITON", raising=False)
    assert triton.unsupported_reason.__wrapped__(torch.device("cuda")) == "TUNESMITH_TRITON is not 1"
