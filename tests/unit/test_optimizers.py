"""AdamW with float32 masters: equal to torch's in float32, and no update lost in bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from tunesmith.engine.optim import adamw
from tunesmith.engine.optim.adamw import AdamW, InBackward, gradient_norm
from tunesmith.engine.optim.rounding import join_halves, split_halves
from tunesmith.engine.optim.sizes import COMPENSATED, STATE_BITS, master_bytes, state_bytes


def trained(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_equals_torch_on_float32() -> None:
    start = torch.randn(40, 7)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = trained(one, AdamW([one], lr=1e-2, weight_decay=0.1))
    theirs = trained(two, torch.optim.AdamW([two], lr=1e-2, weight_decay=0.1, fused=True))
    assert torch.equal(mine, theirs)


def test_parameters_of_a_group_are_updated_as_if_each_were_alone() -> None:
    """float32 parameters are updated together; one of them has no gradient at first, and one is bf16."""
    torch.manual_seed(0)
    shapes = {
        (40, 7): torch.float32,
        (3,): torch.float32,
        (5, 2, 2): torch.float32,
        (9,): torch.bfloat16,
        (8, 8): torch.float32,
    }
    starts = [torch.randn(shape).to(dtype) for shape, dtype in shapes.items()]
    together, alone = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    one = AdamW(together, lr=1e-2, weight_decay=0.1)
    others = [AdamW([parameter], lr=1e-2, weight_decay=0.1) for parameter in alone]
    for step in range(5):
        for number, (left, right) in enumerate(zip(together, alone, strict=True)):
            gradient = torch.randn(left.shape).to(left.dtype)
            left.grad, right.grad = (None, None) if step < 2 and number == 0 else (gradient, gradient.clone())
        one.step()
        for other in others:
            other.step()
    for left, right in zip(together, alone, strict=True):
        assert torch.equal(left, right)
        assert one.state[left]["step"] == 5 - 2 * (left is together[0])


@pytest.mark.parametrize("optim", STATE_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_kept_elsewhere_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, optim: str, dtype: torch.dtype
) -> None:
    """In slices, saved and restored in between; reading them gives a copy."""
    monkeypatch.setattr(adamw, "OPTIMIZER_SLICE", 256)
    torch.manual_seed(0)
    start, gradients = torch.randn(90, 7), [torch.randn(90, 7) for _ in range(4)]
    results = []
    for store in (None, torch.device("cpu")):
        parameter = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = AdamW.named(optim, [parameter], lr=1e-2, weight_decay=0.1, seed=5, store=store)
        for number, gradient in enumerate(gradients):
            parameter.grad = gradient.to(dtype)
            optimizer.step()
            if number == 1:
                kept = {name: tensor.clone() for name, tensor in optimizer.kept({parameter: "p"}).items()}
                optimizer = AdamW.named(optim, [parameter], lr=1e-2, weight_decay=0.1, seed=9, store=store)
                optimizer.allocate()
                optimizer.put_back(kept, {parameter: "p"})
        with optimizer.unloaded():
            results.append((parameter.detach().clone(), kept))
        moment = optimizer.state[parameter]["exp_avg"]
        part = slice(0, 256)
        shares = moment.home.read(moment.values, part, parameter.device).data_ptr() == moment.values.data_ptr()
        assert shares == (store is None)
    (beside, kept_beside), (apart, kept_apart) = results
    assert torch.equal(beside, apart)
    assert kept_beside.keys() == kept_apart.keys()
    assert all(torch.equal(kept_beside[name], tensor) for name, tensor in kept_apart.items())


def test_small_updates_survive_in_bf16() -> None:
    """Steps of 1e-5 on weights of 1: plain bf16 would never change."""
    start = torch.ones(1000)
    weight, plain, exact = (torch.nn.Parameter(start.to(d)) for d in (torch.bfloat16, torch.bfloat16, torch.float32))
    optimizer = AdamW([weight], lr=1e-5)
    for parameter, stepper in (
        (weight, optimizer),
        (plain, torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0)),
        (exact, torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.0, fused=True)),
    ):
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            stepper.step()
    assert torch.equal(plain.detach(), start.bfloat16())
    assert weight.dtype == torch.bfloat16
    optimizer.unload()
    assert weight.dtype == torch.float32
    assert torch.equal(weight.detach(), exact.detach())
    assert exact.detach().mean() < 0.9991


def test_gradient_norm_of_bf16_is_exact_in_float32() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)) for _ in range(3)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.5 + number)
    wanted = torch.cat([p.grad.double() for p in parameters]).norm()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float32
    assert abs(norm.item() / wanted.item() - 1) < 1e-6


@pytest.mark.parametrize(("bits", "error"), [(16, 0.1), (8, 0.11)])
def test_small_states_follow_the_exact_ones(bits: int, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps on a quadratic: the total update differs from exact AdamW's by rounding; in slices, the last one shorter."""
    monkeypatch.setattr(adamw, "OPTIMIZER_SLICE", 1024)
    generator = torch.Generator().manual_seed(0)
    start, goal = (torch.randn(2500, generator=generator) for _ in range(2))
    ways = []
    for dtype, used in ((torch.float32, 32), (torch.bfloat16, bits)):
        weight = torch.nn.Parameter(start.clone().to(dtype))
        optimizer = AdamW([weight], lr=3e-3, bits=used)
        for _ in range(100):
            weight.grad = weight.detach() - goal.to(dtype)
            optimizer.step()
        ways.append(weight.detach().float() - start)
    assert (ways[1] - ways[0]).norm() / ways[0].norm() < error


def test_small_states_lose_no_small_updates_in_the_mean() -> None:
    """Steps of 1e-5 on bf16 weights of 1 without a master: most weights stay, some jump, the mean moves correctly."""
    weight = torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=1e-5, bits=16)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert abs(weight.detach().double().mean().item() - (1 - 20e-5)) < 3e-5


@pytest.mark.parametrize("optim", STATE_BITS)
def test_bytes_a_parameter(optim: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(2**14, dtype=torch.bfloat16))
    optimizer = AdamW([weight], bits=STATE_BITS[optim], compensated=optim in COMPENSATED)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    kept = [*state["exp_avg"].tensors(), *state["exp_avg_sq"].tensors()]
    kept += [state[name] for name in ("master", "compensation") if state.get(name) is not None]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in kept) / 2**14
    assert taken == {"adamw": 12, "adamw_kahan": 6, "adamw_8bit": 2 + 8 / 256}[optim]
    assert taken == state_bytes(optim) + master_bytes(optim)


def test_kahan_sums_are_float32_sums() -> None:
    """A bf16 weight plus the 16 bits that rounding cut off: with exact states the sum equals float32's, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(3000, generator=generator).bfloat16()
    weight, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    kept, plain = AdamW([weight], lr=1e-3, compensated=True), AdamW([exact], lr=1e-3)
    for _ in range(50):
        gradient = torch.randn(3000, generator=generator)
        weight.grad, exact.grad = gradient.bfloat16(), gradient.bfloat16().float()
        kept.step()
        plain.step()
    assert (weight.detach().float() - exact.detach()).abs().max() <= exact.detach().abs().max() / 256
    with kept.unloaded():
        assert torch.equal(weight.detach(), exact.detach())
    assert weight.dtype == torch.bfloat16


def test_halves_join_to_the_same_bits() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, 3.0e38, 1.00390625, -1.00390625, float("inf")])])
    rounded, compensation = split_halves(values.clone())
    assert torch.equal(join_halves(rounded, compensation).view(torch.int32), values.view(torch.int32))
    nearest = values.bfloat16()
    assert (rounded.float() - values)[:-1].abs().le((nearest.float() - values)[:-1].abs()).all()


def test_update_in_backward_equals_update_after() -> None:
    torch.manual_seed(0)
    after = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    during = copy.deepcopy(after)
    one, two = AdamW(after.parameters(), lr=1e-2), AdamW(during.parameters(), lr=1e-2)
    hooks = InBackward(two, max_grad_norm=1e9)
    for _ in range(5):
        x = torch.randn(3, 8)
        after(x).square().sum().backward()
        norm = gradient_norm(after.parameters())
        one.step()
        one.zero_grad()
        during(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in during.parameters())
        assert hooks.take_norm().item() == pytest.approx(norm.item(), rel=1e-6)
    for left, right in zip(after.parameters(), during.parameters(), strict=True):
        assert torch.equal(left, right)
