"""GEMMs with oneDNN: the same values and gradients as torch's, used where they should be, and no growing cache."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tunesmith.engine.modeling import gemm
from tunesmith.engine.modeling.gemm import linear, use_onednn


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that oneDNN is called with."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    shapes: list[Any] = []
    own = gemm._onednn

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return own(x, weight, bias)

    monkeypatch.setattr(gemm, "_onednn", noted)
    return shapes


def test_the_same_product(asked: list[Any]) -> None:
    x, weight, bias = torch.randn(33, 24), torch.randn(40, 24), torch.randn(40)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(expected.float(), weight.T), expected.float() @ weight)  # read by columns
    torch.testing.assert_close(linear(x.T, x.T), x.T @ x)
    assert len(asked) == 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients(asked: list[Any], bias: bool) -> None:
    layer = torch.nn.Linear(24, 40, bias=bias)
    x, upstream = torch.randn(2, 150, 24, requires_grad=True), torch.randn(2, 150, 40)
    wanted = (x, *layer.parameters())
    expected = layer(x)
    gradients = torch.autograd.grad(expected, wanted, upstream)
    assert not asked
    use_onednn(torch.nn.Sequential(layer))
    made = layer(x)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, wanted, upstream), gradients, rtol=1e-5, atol=5e-5)
    assert asked == [((300, 24), (40, 24)), ((300, 40), (24, 40)), ((40, 300), (24, 300))]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
    frozen = layer.requires_grad_(False)(x)
    torch.testing.assert_close(torch.autograd.grad(frozen, x, upstream)[0], gradients[0])
    assert not layer(x.detach()).requires_grad


def test_where_torch_computes_itself(asked: list[Any]) -> None:
    layer = torch.nn.Linear(24, 40)
    use_onednn(layer)
    x = torch.randn(300, 24)
    expected = F.linear(x, layer.weight, layer.bias)
    layer(x[:200])  # too few rows to be worth it
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(layer(x), expected)
    assert layer(x[:0]).shape == (0, 40)
    large = torch.nn.Linear(2**10, 2**13 + 1)
    use_onednn(large)
    large(torch.ones(256, 2**10))
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert not asked


def test_other_layers_stay() -> None:
    """A subclass may compute something different."""

    class Twice(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer, x = Twice(4, 4), torch.randn(2, 4)
    expected = layer(x)
    use_onednn(layer)
    assert torch.equal(layer(x), expected)


_GROWTH = """
import psutil, torch
from tunesmith.hardware.allocators import give_back_freed_memory, keep_few_gemms
from tunesmith.engine.modeling.gemm import linear
if {told}: keep_few_gemms()
weights = [torch.ones(out, 96) for out in range(64, 96, 4)]
def grown():
    give_back_freed_memory()
    return psutil.Process().memory_info().rss
linear(torch.ones(8, 96), weights[0])
before = grown()
for rows in range(16, 976, 16):
    for weight in weights:
        linear(torch.ones(rows, 96), weight)
print((grown() - before) // 2**20)
"""


def test_compiled_gemms_do_not_pile_up() -> None:
    """480 GEMMs of different shapes: without a bound, they stay cached forever."""
    ours = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}

    def grown(told: bool) -> int:
        command = [sys.executable, "-c", _GROWTH.format(told=told)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=ours).stdout)

    assert grown(told=True) < grown(told=False) / 2
