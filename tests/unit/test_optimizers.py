"""AdamW with float32 masters: torch's own in float32, and no update lost in bf16."""

from __future__ import annotations

import torch

from tunesmith.methods.optimizers import MasterAdamW, gradient_norm


def trained(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_equals_torch_on_float32() -> None:
    start = torch.randn(40, 7)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = trained(one, MasterAdamW([one], lr=1e-2, weight_decay=0.1))
    theirs = trained(two, torch.optim.AdamW([two], lr=1e-2, weight_decay=0.1, fused=True))
    assert torch.equal(mine, theirs)


def test_small_updates_survive_in_bf16() -> None:
    """Steps of 1e-5 on weights of 1: bf16 alone would never move."""
    start = torch.ones(1000)
    weight, plain, exact = (torch.nn.Parameter(start.to(d)) for d in (torch.bfloat16, torch.bfloat16, torch.float32))
    optimizer = MasterAdamW([weight], lr=1e-5)
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
