"""Rows of equal length that share nothing: detected, and computed by SDPA's causal kernels with the dense mask's results."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch.profiler import profile

from tunesmith.engine.attention.tree import equal_rows_attention, masked_attention
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import build_tree

HEADS, SHARED, SIZE = 6, 2, 8

#: Rows, and the expected number of equal rows; 0 if they must not be computed as equal rows.
ROWS = [
    ([[1, 2, 3]], 1),
    ([[1, 2, 3], [4, 5, 6]], 2),
    ([[number] * 5 for number in range(4)], 4),
    ([[1, 2, 3], [4, 5]], 0),
    ([[1, 2], [3, 4, 5]], 0),
    ([[1, 2, 3], [1, 2, 4]], 0),
    ([[1, 2, 3, 4], [1, 2]], 0),
    ([[1, 2], [1, 3], [1, 4], [1, 5]], 0),
]


def layout_of(rows: list[list[int]]) -> Layout:
    tree = build_tree(rows, min_shared=1)
    return Layout(tree.nodes, len(tree.ids))


@pytest.mark.parametrize(("rows", "expected"), ROWS)
def test_rows_of_one_length_are_found(rows: list[list[int]], expected: int) -> None:
    layout = layout_of(rows)
    assert layout.equal_rows == expected
    starts = [0, *accumulate(map(len, rows))]
    apart = torch.zeros((layout.length, layout.length), dtype=torch.bool)
    for begin, end in pairwise(starts):
        apart[begin:end, begin:end] = True
    if expected:  # each token attends only to its own row
        assert torch.equal(layout.mask(torch.device("cpu")), apart.tril())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_attention_and_gradients_are_those_of_the_dense_mask(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = layout_of([[number] * 7 for number in range(count)])
    # (1, H, T, D) in the memory layout of a model's projections: token by token
    shapes = [(1, layout.length, heads, SIZE) for heads in (HEADS, SHARED, SHARED)]
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(1, HEADS, layout.length, SIZE).to(dtype)
    given = [leaf.transpose(1, 2) for leaf in leaves]
    made = equal_rows_attention(given[0], given[1], given[2], layout.equal_rows, 0.3)
    expected = masked_attention(given[0], given[1], given[2], layout, 0.3)
    pairs = [(made, expected)]
    pairs += zip(*(torch.autograd.grad(each, leaves, upstream) for each in (made, expected)), strict=True)
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_no_gradient_is_put_into_zeros() -> None:
    """As indexing would: three tensors to fill and to copy in each block."""
    leaves = [torch.randn(1, 12, heads, SIZE, requires_grad=True) for heads in (HEADS, SHARED, SHARED)]
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    made = equal_rows_attention(query, key, value, 2, 0.3).transpose(1, 2)
    assert made.is_contiguous()
    with profile() as recorded:
        made.backward(torch.ones_like(made))
    names = {event.key for event in recorded.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not names & {"aten::select_backward", "aten::slice_backward", "aten::index_put_"}
