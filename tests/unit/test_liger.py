"""Liger's kernels match PyTorch's operators, in Triton's interpreter, which needs no GPU; and where they are unavailable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.support.recipes import CPU, GOOD, GPU, problems, recipe
from tunesmith.errors import RecipeError
from tunesmith.hardware import Hardware
from tunesmith.kernels.liger import liger
from tunesmith.methods.settings import settle

SCRIPT = """
import copy, json, os
os.environ["TRITON_INTERPRET"] = "1"
import liger_kernel.ops.geglu as geglu, liger_kernel.ops.rms_norm as rms_norm
import numpy as np, torch, triton.language as tl, triton.runtime.interpreter as interpreter
from transformers import AutoModelForCausalLM
from tests.support.models import CONFIGS
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.kernels.dispatch import EAGER
from tunesmith.kernels.liger import liger
from tunesmith.engine.packing.batch import collate_tree
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import summed_loss

before = interpreter._implicit_cvt
def with_floats(value):  # a compiled kernel gets them as float32 scalars, an interpreted one as they are
    if not isinstance(value, float):
        return before(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = with_floats
# What is CUDA's own has no interpreter.
rms_norm.rsqrt, geglu.tanh = lambda x: tl.rsqrt(x), lambda x: 2 * tl.sigmoid(2 * x) - 1

kernels, apart = liger(torch.device("cpu")), {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    x, up, gradient = (torch.randn(2, 5, 48).to(dtype) for _ in range(3))
    weight = torch.randn(48).to(dtype)
    for offset in (0.0, 1.0):
        out, root = EAGER.norm(x, weight, 1e-5, offset)
        pairs = [*zip(kernels.norm(x, weight, 1e-5, offset), (out, root))]
        for of_weight in (True, False):
            given = (gradient, x, root, weight, offset, of_weight)
            pairs += [*zip(kernels.norm_backward(*given), EAGER.norm_backward(*given))]
    for activation in ("silu", "gelu_pytorch_tanh", "gelu"):
        pairs.append((kernels.gated(x, up, activation), EAGER.gated(x, up, activation)))
        expected = EAGER.gated_backward(gradient, x.clone(), up.clone(), activation)
        pairs += [*zip(kernels.gated_backward(gradient, x.clone(), up.clone(), activation), expected)]
    assert [one is None for one, _ in pairs] == [other is None for _, other in pairs]
    pairs = [(a.float(), b.float()) for a, b in pairs if b is not None]
    apart[str(dtype)] = max(float(((a - b).abs() / (b.abs() + 1)).max()) for a, b in pairs)

def gradients(kernels):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["qwen3"])).train()
    fuse_blocks(model, kernels)
    use_tree_attention(model, on=True)
    summed_loss(model, collate_tree([{"input_ids": list(range(1, 20)), "loss_mask": [True] * 19}])).backward()
    return torch.cat([each.grad.flatten() for each in model.parameters()])

one, other = gradients(kernels), gradients(EAGER)
apart["model"] = float((one - other).norm() / other.norm())
print(json.dumps(apart))
"""


@pytest.mark.skipif(not (find_spec("triton") and find_spec("liger_kernel")), reason="liger-kernel and Triton are not installed")
def test_kernels_are_those_of_the_formulas() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    apart = json.loads(done.stdout.splitlines()[-1])
    assert apart["torch.float32"] < 2e-6
    assert apart["torch.bfloat16"] < 0.02
    assert apart["model"] < 1e-5


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    with pytest.raises(RuntimeError, match="liger_kernel"):
        liger(torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "hardware", "used"),
    [
        ({}, GPU, True),
        ({}, CPU, False),
        ({"use_liger_kernel": "false"}, GPU, False),
        ({"use_liger_kernel": "true"}, GPU, True),
        ({"torch_compile": "true"}, GPU, False),
    ],
)
def test_a_gpu_uses_them_unless_the_recipe_says_otherwise(asked: dict[str, str], hardware: Hardware, used: bool) -> None:
    settings = settle(recipe(**asked), 100, hardware)
    assert settings.use_liger_kernel is used
    assert (settings.reasons.get("use_liger_kernel", "recipe") != "recipe") == (used and not asked)


def test_a_cpu_has_kernels_of_our_own() -> None:
    with pytest.raises(RecipeError, match="use_liger_kernel without a GPU"):
        settle(recipe(use_liger_kernel="true"), 100, CPU)


def test_one_of_two_makes_the_kernels() -> None:
    (what,) = problems(GOOD + "train: {use_liger_kernel: true, torch_compile: true}")
    assert "use_liger_kernel" in what
    assert "torch_compile" in what
