"""A tree's block mask equals its dense mask, and flex attention with it computes the same."""

from __future__ import annotations

import warnings
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tunesmith.engine.attention.flex import unsupported_reason
from tunesmith.engine.attention.tree import masked_attention
from tunesmith.engine.packing.layout import BLOCK, Layout, block_mask, subtree_ends
from tunesmith.engine.packing.tree import Tree, build_tree

CPU = torch.device("cpu")


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Rows of up to four stretches, each long enough to cross a block boundary, many of them shared."""
    stretches = [[number] * draw(st.integers(1, 300)) for number in range(1, 6)]
    chosen = st.lists(st.sampled_from(stretches), min_size=1, max_size=4)
    return build_tree([list(chain(*draw(chosen))) for _ in range(draw(st.integers(1, 6)))])


def listed(counts: torch.Tensor, numbers: torch.Tensor) -> set[tuple[int, int]]:
    """(query block, key block) of each entry."""
    return {
        (query, int(key))
        for query in range(numbers.shape[-2])
        for key in numbers[0, 0, query, : int(counts[0, 0, query])].tolist()
    }


def blocks_of(mask: BlockMask) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Full blocks, and partial blocks."""
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return listed(mask.full_kv_num_blocks, mask.full_kv_indices), listed(mask.kv_num_blocks, mask.kv_indices)


@given(tree=trees())
@settings(deadline=None)
def test_blocks_are_what_the_dense_mask_says(tree: Tree) -> None:
    length = len(tree.ids)
    dense = Layout(tree.nodes, length).mask(CPU)
    ends = subtree_ends(tree.nodes, length)
    place = torch.arange(length)
    assert torch.equal((place[:, None] >= place) & (place[:, None] < ends), dense)
    made = block_mask(tree.nodes, length, CPU)
    whole, partly = blocks_of(made)
    count = -(-length // BLOCK)
    padded = torch.zeros((count * BLOCK, count * BLOCK), dtype=torch.bool)
    padded[:length, :length] = dense
    squares = padded.view(count, BLOCK, count, BLOCK).transpose(1, 2)
    every = {(query, key): squares[query, key] for query in range(count) for key in range(count)}
    assert whole == {where for where, square in every.items() if square.all()}
    assert partly == {where for where, square in every.items() if square.any() and not square.all()}
    assert made.full_q_num_blocks is not None
    assert made.full_q_indices is not None
    assert listed(made.full_q_num_blocks, made.full_q_indices) == {(key, query) for query, key in whole}


def test_flex_attention_with_it_equals_the_dense_mask() -> None:
    """Forward only, since flex attention has no backward pass on a CPU; tests/gpu checks its gradients."""
    shared = [1] * 150
    tree = build_tree([shared + [number] * (40 * number) for number in range(2, 7)] + [[9] * 77])
    layout = Layout(tree.nodes, len(tree.ids))
    torch.manual_seed(0)
    query = torch.randn((1, 4, layout.length, 16), dtype=torch.float64)
    key, value = (torch.randn((1, 2, layout.length, 16), dtype=torch.float64) for _ in range(2))
    mask = layout.blocks(CPU)
    assert layout.blocks(CPU) is mask
    expected = masked_attention(query, key, value, layout, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is slow uncompiled
        found = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_flex_attention_cannot_do_is_told() -> None:
    assert "float64" in str(unsupported_reason(CPU, torch.float64))
    assert "does not run here" in str(unsupported_reason(CPU, torch.float32))  # no backward pass on a CPU
