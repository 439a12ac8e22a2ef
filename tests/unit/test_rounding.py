"""Rounding to bfloat16 for export: exact values are unchanged, means are kept, small updates survive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.engine.optim.rounding import round_model, round_stochastically


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_values_that_bfloat16_holds_stay() -> None:
    values = torch.randn(10_000, generator=generator()).bfloat16().float()
    assert torch.equal(round_stochastically(values, generator()).float(), values)


@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_nan=False))
def test_result_is_one_of_the_two_neighbours(value: float) -> None:
    exact = torch.full((64,), value)
    rounded = round_stochastically(exact, generator()).float()
    low, high = rounded.min(), rounded.max()
    assert low <= value <= high or low == high
    nearest = exact[:1].bfloat16().float()
    assert nearest in rounded or abs(value) < 1e-30
    assert len(set(rounded.tolist())) <= 2


def test_mean_is_kept_where_rounding_to_nearest_loses_the_update() -> None:
    base, update = 1.0, 0.001  # bfloat16's neighbours of 1 are 1/128 above and 1/256 below
    values = torch.full((1_000_000,), base + update)
    assert float(values.bfloat16().float().mean()) == base
    assert float(round_stochastically(values, generator()).double().mean()) == pytest.approx(base + update, abs=1e-5)


def test_same_seed_same_bits() -> None:
    values = torch.randn(1000, generator=generator())
    first, second = (round_stochastically(values, generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, round_stochastically(values, generator(4)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        round_stochastically(torch.tensor([1.0, bad]), generator())


def test_tied_parameters_stay_tied() -> None:
    embedding, head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = round_model(torch.nn.Sequential(embedding, head), seed=0)
    assert model[0].weight is model[1].weight
    assert model[1].weight.dtype == torch.bfloat16
