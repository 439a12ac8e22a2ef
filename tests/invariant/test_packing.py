"""A prefix tree computes the same as padded rows: loss and every gradient, in float64, for each architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from tests.support.models import (
    CONFIGS,
    SMALL,
    exact_model,
    fused_model,
    loss_and_gradients,
    random_rows,
    transformers_loss,
    with_gradients,
)
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.attention.tree import masked_attention, tree_attention
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import (
    Collator,
    PaddedCollator,
    StepCollator,
    collate_tree,
    computed_ids,
    tree_unsupported_reason,
)
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import FILL, Limits, build_tree, fill, filled, split_by_length, split_for_trees
from tunesmith.models.families import FAMILIES


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == {name for name, family in FAMILIES.items() if family.causal_rotary}


@given(random_rows(), st.integers(1, 10))
def test_tree_keeps_every_row(rows: list[dict[str, Any]], min_shared: int) -> None:
    tree = build_tree([row["input_ids"] for row in rows], min_shared)
    assert sum(node.end - node.start for node in tree.nodes) == len(tree.ids) == len(tree.positions)
    for row, path in zip(rows, tree.paths, strict=True):
        assert [tree.ids[place] for place in path] == row["input_ids"]
        assert [tree.positions[place] for place in path] == list(range(len(path)))
    # According to the nodes, a token attends to exactly the tokens before it in its row.
    mask = Layout(tree.nodes, len(tree.ids)).mask(torch.device("cpu"))
    for path in tree.paths:
        for index, place in enumerate(path):
            assert mask[place].nonzero().flatten().tolist() == path[: index + 1]


@given(random_rows())
def test_nothing_that_two_rows_share_is_laid_out_twice(rows: list[dict[str, Any]]) -> None:
    texts = [tuple(row["input_ids"]) for row in rows]
    distinct = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    assert len(build_tree(texts, min_shared=1).ids) == len(distinct)


@given(rows=random_rows(), tokens=st.integers(1, 120), most=st.integers(1, 6))
def test_a_step_is_cut_into_micro_batches_within_the_limits(rows: list[dict[str, Any]], tokens: int, most: int) -> None:
    limits = Limits(tokens, most)
    for collate in (collate_tree, PaddedCollator(pad_id=0)):
        batches = StepCollator(collate, limits)(rows)["micro_batches"]
        assert sum(batch["row_tokens"] for batch in batches) == sum(len(row["input_ids"]) for row in rows)
        whole = collate(rows)
        assert sum(batch["labelled"] for batch in batches) == whole["labelled"]
        alone = {collate([row])["input_ids"].numel() for row in rows}
        assert all(batch["input_ids"].numel() <= tokens or batch["input_ids"].numel() in alone for batch in batches)
        groups = split_for_trees([row["input_ids"] for row in rows], limits)
        assert sorted(index for group in groups for index in group) == list(range(len(rows)))
        for group in groups:
            held = len(build_tree([rows[index]["input_ids"] for index in group]).ids)
            assert len(group) == 1 or (held <= tokens and len(group) <= most)


def test_rows_that_share_come_together() -> None:
    """Two instructions, mixed: each micro-batch computes only one of them."""
    rows = [[kind] * 40 + [10 + number, 11, 12] for number in range(8) for kind in (1, 2)]
    groups = split_for_trees(rows, Limits(70))
    assert [{rows[index][0] for index in group} for group in groups] in ([{1}, {2}], [{2}, {1}])
    assert split_for_trees(rows, Limits(2_000)) == [list(range(16))]


def test_what_shares_nothing_fills_micro_batches_tightly() -> None:
    """70 + 26 and 60 + 36 fit into two times 96; in their given order they would need three. Trees are padded."""
    rows = [[start + place for place in range(length)] for start, length in ((0, 60), (100, 70), (200, 36), (300, 26))]
    assert len(split_for_trees(rows, Limits(95))) == 3
    assert sorted(map(sorted, split_for_trees(rows, Limits(100)))) == [[0, 2], [1, 3]]


def test_memory_is_weighed_against_time() -> None:
    """The smallest micro-batches whose step is within 1/20 of the fastest; rows that share a prefix are not split up."""
    apart = [[number * 1000 + place for place in range(100)] for number in range(20)]  # 2,000 tokens, nothing in common
    for start, size in ((0, 200), (20, 500), (50, 1000), (500, 2000)):
        groups = split_for_trees(apart, Limits(4096, None, start))
        assert sorted(index for group in groups for index in group) == list(range(20))
        largest = max(100 * len(group) for group in groups)
        assert size / 2 < largest <= size, start
        costs = {tokens: 2000 + start * len(split_for_trees(apart, Limits(tokens))) for tokens in (256, 512, 1024, 2048, 4096)}
        assert 2000 + start * len(groups) <= 1.05 * min(costs.values())
    shared = [[*range(400), 1000 + number, 2000 + number] for number in range(20)]
    assert split_for_trees(shared, Limits(4096, None, 10)) == [list(range(20))]  # each part would recompute 400 tokens
    assert len(split_by_length([100] * 20, Limits(4096, None, 20))) == 4
    assert len(split_for_trees(apart, Limits(300, None, 0))) > 6  # the limit is respected


def test_padded_rows_come_with_their_like() -> None:
    assert split_by_length([5, 90, 6, 88], Limits(200)) == [[0, 2], [3, 1]]
    assert split_by_length([5, 90, 6, 88], Limits(None, 3)) == [[0, 2], [3, 1]]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(rows=random_rows())
def test_tree_equals_padded_rows_to_1e_10(name: str, rows: list[dict[str, Any]]) -> None:
    model, fused = exact_model(name), fused_model(name)
    padded, packed = PaddedCollator(pad_id=0)(rows), collate_tree(rows)
    assert padded["labelled"] == packed["labelled"] == sum(sum(row["loss_mask"][1:]) for row in rows)
    assert [float(batch["weights"].sum()) for batch in (padded, packed)] == 2 * [padded["labelled"]]
    expected_loss, expected = with_gradients(model, lambda: transformers_loss(model, rows))
    for computes, batch, tree in ((fused, packed, True), (fused, padded, False), (model, padded, False)):
        found_loss, found = loss_and_gradients(computes, batch, tree=tree)
        assert found_loss == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-10, msg=parameter)


@given(rows=random_rows())
def test_no_token_is_computed_that_no_label_needs(rows: list[dict[str, Any]]) -> None:
    lasts = [max((place for place, trained in enumerate(row["loss_mask"]) if trained and place), default=1) for row in rows]
    needed = {tuple(row["input_ids"][:end]) for row, last in zip(rows, lasts, strict=True) for end in range(1, last + 1)}
    tree = build_tree([computed_ids(row) for row in rows], min_shared=1)
    assert len(tree.ids) == len(needed)
    padded = PaddedCollator(pad_id=0)(rows)
    assert padded["input_ids"].shape == (len(rows), max(lasts))
    assert padded["row_tokens"] == collate_tree(rows)["row_tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("collate", [collate_tree, PaddedCollator(pad_id=0)], ids=["tree", "padded"])
def test_the_last_block_ends_at_the_labelled_places(collate: Collator) -> None:
    """After the last attention only labelled positions are computed; a call without labelled positions computes all."""
    model = fused_model("llama")
    rows = [{"input_ids": [*range(1, 31), 40 + n, 50, 51], "loss_mask": [False] * 31 + [True] * 2} for n in range(4)]
    batch = collate(rows)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    use_tree_attention(model, on="tree_layout" in batch)
    summed_loss(model, batch)
    assert seen == [batch["input_ids"].numel()] * (len(seen) - 1) + [len(batch["sources"])]
    use_tree_attention(model, on=False)
    assert model(input_ids=torch.ones((2, 7), dtype=torch.long)).logits.shape[:2] == (2, 7)


def test_structured_attention_equals_a_dense_mask() -> None:
    """Depth four, several roots, one-token nodes; gradients of query, key and value."""
    rows = [[1] * 9 + [2] * n + [3] * m for n in (8, 9) for m in (1, 8, 20)] + [[5, 6]]
    tree = build_tree(rows)
    layout = Layout(tree.nodes, len(tree.ids))
    assert max(len({n for n in tree.nodes if n.start <= place < n.subtree_end}) for place in range(len(tree.ids))) >= 3
    torch.manual_seed(0)
    shape = (1, 4, len(tree.ids), 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, _ = tree_attention(None, *inputs, None, scaling=0.3, tree_layout=layout)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=layout.mask(torch.device("cpu")), scale=0.3)
    torch.testing.assert_close(masked_attention(*inputs, layout, 0.3), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(found)
    one = torch.autograd.grad((found * direction).sum(), inputs)
    two = torch.autograd.grad((expected.transpose(1, 2) * direction).sum(), inputs)
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_shared_instruction_is_computed_once() -> None:
    shared = list(range(1, 51))
    rows = [{"input_ids": [*shared, 51 + n, 52, 53], "loss_mask": [False] * 51 + [True] * 2} for n in range(6)]
    batch = collate_tree(rows)
    assert batch["input_ids"].shape == (1, filled(50 + 6 * 2))  # each row's last label is only a target
    assert batch["labelled"] == 12


@given(rows=random_rows())
def test_what_fills_a_tree_up_is_seen_by_no_row(rows: list[dict[str, Any]]) -> None:
    plain = build_tree([row["input_ids"] for row in rows])
    tree, held = fill(plain), len(plain.ids)
    assert len(tree.ids) == len(tree.positions) == filled(held)
    assert filled(held) % FILL == 0
    assert 0 <= filled(held) - held < FILL
    assert tree.ids[:held] == plain.ids
    assert tree.paths == plain.paths
    mask = Layout(tree.nodes, len(tree.ids)).mask(torch.device("cpu"))
    assert torch.equal(mask[:held, :held], Layout(plain.nodes, held).mask(torch.device("cpu")))
    assert not mask[:held, held:].any()
    batch = collate_tree(rows)
    assert len(batch["weights"]) % FILL == 0
    assert batch["labelled"] == sum(sum(row["loss_mask"][1:]) for row in rows)


def test_what_is_not_exact_is_refused() -> None:
    assert tree_unsupported_reason(CONFIGS["llama"], 10_000) is None
    windowed = MistralConfig(**SMALL, sliding_window=16)
    assert tree_unsupported_reason(windowed, 16) is None
    assert "sliding window" in str(tree_unsupported_reason(windowed, 17))
    assert "attention dropout" in str(tree_unsupported_reason(LlamaConfig(**SMALL, attention_dropout=0.1), 4))
    assert "not proven" in str(tree_unsupported_reason(type("C", (), {"model_type": "mamba"})(), 4))
    with pytest.raises(ValueError, match="tree layout"):
        tree_attention(None, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), None)
