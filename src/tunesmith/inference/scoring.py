"""Log-likelihoods of continuations, as multiple-choice tasks need them; shared prefixes are computed once.

Requests of one task share a few-shot header, and those of one question share their whole context. They are packed into prefix
trees within a token budget. A continuation's last token is only a target, so it is in no tree, and the one-token choices of a
question are predicted from one position. Logits are computed only for positions that predict a token, each once, in chunks.

Shapes: N distinct positions of one tree, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.chunks import chunk_rows
from tunesmith.engine.modeling.loss import logits_in_chunks
from tunesmith.engine.packing.batch import Batch, padded, to_device, tree_unsupported_reason
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import MIN_SHARED, Limits, build_tree, fill, shared_length, split_by_length
from tunesmith.models.head import changes_logits

#: Tokens per forward pass. Each tree recomputes the header, so few large trees are better than many small ones;
#: docs/architecture.md has token counts, `benchmarks/mmlu_scoring.py --budgets` the seconds.
MAX_TOKENS = 8192

_AT_ONCE = 256  # padded rows per call of the split, whose cost grows with the square of their number

Row = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Asks for the likelihood of `continuation` after `context`. Both are token ids, and neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("a request needs a context and a continuation, both non-empty")

    @property
    def row(self) -> Row:
        """The ids that go through the model: all but the last."""
        return (*self.context, *self.continuation[:-1])


class Likelihood(NamedTuple):
    """log p(continuation | context) in nats, and whether greedy decoding would produce the continuation."""

    log_likelihood: float
    greedy: bool


class _Label(NamedTuple):
    """A token to score: the position in the batch that predicts it, its id, and its request."""

    place: int
    token: int
    request: int


def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    *,
    pad_id: int | None = None,
    max_tokens: int = MAX_TOKENS,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
    """The likelihood of each request, in the requests' order; the same as if each were computed alone.

    Rows go through the model as prefix trees of up to `max_tokens` tokens if that is exact for the model, else padded;
    a longer row goes alone. Apart from the requests, memory holds one batch at a time. Log-softmax is in float32, or in float64
    if the model is. `on_batch` gets the number of finished requests after each batch. Puts the model into eval mode.
    """
    if not requests:
        return []
    wanted: defaultdict[Row, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        wanted[request.row].append(index)
    rows = sorted(wanted)
    as_tree = reason_for_padding(model.config, requests) is None
    totals, greedy, done = [0.0] * len(requests), [True] * len(requests), 0
    model.eval()
    use_tree_attention(model, on=as_tree)
    try:
        for group in split_sorted(rows, max_tokens) if as_tree else _padded_groups(model, rows, max_tokens):
            batch, paths = _tree_batch(group) if as_tree else _padded_batch(group, pad_id)
            labels = [
                _Label(path[place], token, index)
                for row, path in zip(group, paths, strict=True)
                for index in wanted[row]
                for place, token in enumerate(requests[index].continuation, len(requests[index].context) - 1)
            ]
            for label, log_p, is_best in _tell(model, batch, labels):
                totals[label.request] += log_p
                greedy[label.request] &= is_best
            done += sum(len(wanted[row]) for row in group)
            on_batch(done)
    finally:
        use_tree_attention(model, on=False)
    return [Likelihood(total, best) for total, best in zip(totals, greedy, strict=True)]


def reason_for_padding(config: Any, requests: Iterable[Request]) -> str | None:
    """Why these requests cannot be packed into trees for this model, or None if they can."""
    longest = max(len(request.context) + len(request.continuation) - 1 for request in requests)
    return tree_unsupported_reason(config, longest)


def split_sorted(rows: Sequence[Row], max_tokens: int) -> list[Sequence[Row]]:
    """Sorted rows cut into stretches whose trees have up to `max_tokens` tokens, with the fewest recomputed tokens.

    A cut recomputes the prefix that the rows on its two sides share. Of equal solutions, the one with the fewest stretches is
    chosen. Exact, by dynamic programming from the left; a row beyond the budget is a stretch of its own.
    """
    # A tree shares all but the last few tokens of the prefix that a row shares with the one before it: see `tree.build_tree`.
    shared = [0, *(max(0, shared_length(left, right) - MIN_SHARED + 1) for left, right in pairwise(rows))]
    best: list[tuple[int, int]] = [(0, 0)]  # for the first k rows: tokens computed, and stretches
    begins: list[int] = []
    for last in range(len(rows)):
        options = []
        below = 0  # tokens of the rows begin+1..last in the tree of a stretch that starts at `begin`
        for begin in range(last, -1, -1):
            tokens = len(rows[begin]) + below
            if begin < last and tokens > max_tokens:
                break
            options.append((best[begin][0] + tokens, best[begin][1] + 1, begin))
            below += len(rows[begin]) - shared[begin]
        tokens, count, begin = min(options)
        best.append((tokens, count))
        begins.append(begin)
    stretches: list[Sequence[Row]] = []
    end = len(rows)
    while end:
        stretches.append(rows[begins[end - 1] : end])
        end = begins[end - 1]
    return stretches[::-1]


def _padded_groups(model: Any, rows: Sequence[Row], max_tokens: int) -> Iterator[Sequence[Row]]:
    """Rows of similar length, the longest first; small groups if the model's own forward computes the logits."""
    if changes_logits(model):
        max_tokens = min(max_tokens, chunk_rows(model.config.vocab_size))
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), _AT_ONCE):
        some = ordered[start : start + _AT_ONCE]
        for group in split_by_length([len(row) for row in some], Limits(max_tokens)):
            yield [some[index] for index in group]


def _tree_batch(rows: Sequence[Row]) -> tuple[Batch, Sequence[Sequence[int]]]:
    """The model's inputs for a tree of rows, and for each row the indices of its tokens."""
    tree = fill(build_tree(rows))
    batch: Batch = {
        "input_ids": torch.tensor([tree.ids], dtype=torch.long),
        "position_ids": torch.tensor([tree.positions], dtype=torch.long),
        "tree_layout": Layout(tree.nodes, len(tree.ids)),
    }
    return batch, tree.paths


def _padded_batch(rows: Sequence[Row], pad_id: int | None) -> tuple[Batch, Sequence[Sequence[int]]]:
    """The same for padded rows; indices are into the flattened batch."""
    batch = padded(rows, pad_id)
    width = batch["input_ids"].shape[1]
    return batch, [range(number * width, number * width + len(row)) for number, row in enumerate(rows)]


@torch.no_grad()
def _tell(model: Any, batch: Batch, labels: list[_Label]) -> Iterator[tuple[_Label, float, bool]]:
    """For each label its log-probability in nats, and whether it is the most likely token."""
    labels.sort()
    places = sorted({label.place for label in labels})
    number = {place: index for index, place in enumerate(places)}
    batch = to_device({**batch, "sources": torch.tensor(places, dtype=torch.long)}, model.device)
    begin = 0
    for first, logits in logits_in_chunks(model, batch):  # (positions of the chunk, V)
        stop = begin
        while stop < len(labels) and number[labels[stop].place] < first + len(logits):
            stop += 1
        some = labels[begin:stop]
        where = torch.tensor([number[label.place] - first for label in some], device=logits.device)
        tokens = torch.tensor([label.token for label in some], device=logits.device)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = exact[where, tokens] - exact.logsumexp(-1)[where]
        best = exact.argmax(-1)[where] == tokens
        yield from zip(some, log_p.tolist(), best.tolist(), strict=True)
        begin = stop
