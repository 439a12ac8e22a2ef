"""Scoring on prefix trees equals scoring each request alone: log-likelihoods to 1e-10 in float64, the same greedy flags."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, MistralConfig

from tests.support.models import CONFIGS, SMALL, VOCABULARY, exact_model, ids
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling import loss
from tunesmith.engine.packing.tree import build_tree
from tunesmith.inference import scoring
from tunesmith.inference.scoring import Likelihood, Request, log_likelihoods, reason_for_padding, split_sorted

any_id = st.integers(1, VOCABULARY - 1)


@st.composite
def random_requests(draw: st.DrawFn) -> list[Request]:
    """Contexts grown from shared stems, requested once or several times, with continuations of one or more tokens."""
    stems = [draw(st.lists(ids, min_size=1, max_size=14))]
    for _ in range(draw(st.integers(0, 3))):
        stems.append(draw(st.sampled_from(stems)) + draw(st.lists(ids, max_size=14)))
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.sampled_from(stems)) + draw(st.lists(any_id, max_size=10))
        continuations = draw(st.lists(st.lists(any_id, min_size=1, max_size=4), min_size=1, max_size=4))
        requests += [Request(context, continuation) for continuation in continuations]
    return draw(st.permutations(requests))


def one_by_one(model: Any, requests: list[Request]) -> list[Likelihood]:
    """Each request as its own row, with the model's own forward."""
    use_tree_attention(model, on=False)
    model.eval()
    found = []
    for request in requests:
        row = torch.tensor([[*request.context, *request.continuation]])
        with torch.no_grad():
            log_p = model(input_ids=row).logits[0, len(request.context) - 1 : -1].log_softmax(-1)
        told = row[0, len(request.context) :]
        total = log_p.gather(-1, told.unsqueeze(-1)).sum().item()
        found.append(Likelihood(total, bool((log_p.argmax(-1) == told).all())))
    return found


def check_equal(found: list[Likelihood], expected: list[Likelihood]) -> None:
    assert [one.log_likelihood for one in found] == pytest.approx([one.log_likelihood for one in expected], abs=1e-10)
    assert [one.greedy for one in found] == [one.greedy for one in expected]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(requests=random_requests(), max_tokens=st.integers(1, 150))
def test_trees_equal_rows_one_by_one(name: str, requests: list[Request], max_tokens: int) -> None:
    model = exact_model(name)
    assert reason_for_padding(model.config, requests) is None
    expected = one_by_one(model, requests)
    check_equal(log_likelihoods(model, requests), expected)
    check_equal(log_likelihoods(model, requests, max_tokens=max_tokens), expected)


class Padded:
    """Models for which no tree is exact."""

    windowed = MistralConfig(**SMALL, sliding_window=4)
    capped = Gemma2Config(**SMALL, final_logit_softcapping=2.0, sliding_window=64)
    scaled = CohereConfig(**{key: value for key, value in SMALL.items() if key != "head_dim"}, logit_scale=0.3)


@pytest.mark.parametrize("config", [Padded.windowed, Padded.capped, Padded.scaled], ids=["windowed", "capped", "scaled"])
@settings(max_examples=20, deadline=None)
@given(requests=random_requests(), max_tokens=st.integers(1, 150))
def test_padded_rows_equal_rows_one_by_one(config: Any, requests: list[Request], max_tokens: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    for module in model.modules():
        if type(module).__name__ == "CohereLayerNorm":  # computes in float32, which hides 1e-8
            module.forward = lambda x, own=module: torch.nn.functional.layer_norm(
                x, x.shape[-1:], own.weight, None, own.variance_epsilon
            )
    requests = [*requests, Request([1] * 5, [2, 3])]  # beyond the window
    assert reason_for_padding(model.config, requests) is not None
    found = log_likelihoods(model, requests, max_tokens=max_tokens)
    expected = one_by_one(model, requests)
    tolerance = 1e-10 if config is Padded.scaled else 1e-5  # the others' norms compute in float32
    assert [one.log_likelihood for one in found] == pytest.approx([one.log_likelihood for one in expected], abs=tolerance)
    assert [one.greedy for one in found] == [one.greedy for one in expected]


def test_greedy_continuations_are_found() -> None:
    """The output of greedy decoding is greedy, and it no longer is once one token is changed."""
    model = exact_model("llama")
    context = [1, 2, 3, 4]
    written = list(context)
    for _ in range(3):
        written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
    best = written[4:]
    changed = [[*best[:place], 1 + best[place] % (VOCABULARY - 1), *best[place + 1 :]] for place in range(3)]
    found = log_likelihoods(model, [Request(context, best), *(Request(context, other) for other in changed)])
    assert [one.greedy for one in found] == [True, False, False, False]


def test_a_place_gets_its_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four questions with four one-token choices: one header, four nodes, four positions."""
    batches = []

    def watch(model: Any, batch: Any) -> Any:
        batches.append(batch)
        return loss.logits_in_chunks(model, batch)

    monkeypatch.setattr(scoring, "logits_in_chunks", watch)
    header = [1 + number % 50 for number in range(40)]
    requests = [Request([*header, *[51 + q] * 10], [letter]) for q in range(4) for letter in (1, 2, 3, 4)]
    log_likelihoods(exact_model("llama"), requests)
    (batch,) = batches
    assert batch["input_ids"].shape == (1, 40 + 4 * 10)
    assert len(batch["sources"]) == 4


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three positions. No chunk is without labels, since each position predicts one."""
    model = exact_model("llama")
    requests = [Request([1, 2, 3, q], [5, 6, 7, letter]) for q in range(1, 6) for letter in (8, 9)]
    expected = one_by_one(model, requests)
    monkeypatch.setattr(loss, "chunk_rows", lambda _: 3)
    sizes = []

    def watch(model: Any, batch: Any) -> Any:
        for first, logits in loss.logits_in_chunks(model, batch):
            sizes.append(len(logits))
            yield first, logits

    monkeypatch.setattr(scoring, "logits_in_chunks", watch)
    check_equal(log_likelihoods(model, requests), expected)
    assert max(sizes) == 3
    assert sum(sizes) > 3 * 3


rows = st.lists(st.lists(ids, min_size=1, max_size=40).map(tuple), min_size=1, max_size=9, unique=True).map(sorted)


@given(rows=rows, max_tokens=st.integers(1, 120))
def test_stretches_hold_every_row_within_the_budget(rows: list[tuple[int, ...]], max_tokens: int) -> None:
    stretches = split_sorted(rows, max_tokens)
    assert [row for stretch in stretches for row in stretch] == rows
    for stretch in stretches:
        assert len(stretch) == 1 or len(build_tree(stretch).ids) <= max_tokens


def test_no_cut_is_better() -> None:
    """Compared with all ways to cut nine rows of two headers: none computes fewer tokens within the budget."""
    rows = sorted(
        [(header,) * 30 + (9, question, *(5,) * (10 + 3 * question)) for header in (1, 2) for question in range(5)][1:]
    )
    budget = 75
    sizes = []
    for cuts in itertools.product((False, True), repeat=len(rows) - 1):
        edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(rows)]
        trees = [len(build_tree(rows[low:high]).ids) for low, high in itertools.pairwise(edges)]
        if max(trees) <= budget:
            sizes.append(sum(trees))
    found = [len(build_tree(stretch).ids) for stretch in split_sorted(rows, budget)]
    slack = 8 * len(rows)  # shared prefixes are counted up to seven tokens short, see `split_sorted`
    assert min(sizes) <= sum(found) <= min(sizes) + slack
    assert {row[0] for row in split_sorted(rows, 150)[0]} == {1}  # the best cut is at a new header


def test_progress_and_the_order_of_results() -> None:
    model = exact_model("llama")
    requests = [Request([1 + number % 7] * 12, [1 + number % 5]) for number in range(20)]
    done: list[int] = []
    found = log_likelihoods(model, requests, max_tokens=30, on_batch=done.append)
    assert done == sorted(done)
    assert done[-1] == 20
    assert len(done) > 1
    check_equal(found, one_by_one(model, requests))
    assert log_likelihoods(model, []) == []


def test_a_request_without_context_or_continuation_is_refused() -> None:
    for context, continuation in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="needs a context"):
            Request(context, continuation)


def test_the_model_is_left_with_plain_attention() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with pytest.raises(IndexError):
        log_likelihoods(model, [Request([1, VOCABULARY + 5], [1])])
    assert model.config._attn_implementation == "sdpa"
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)
