"""Rows of token ids to the tensors of one forward pass: as a prefix tree, or padded.

A row goes through the model up to the token that predicts its last label. Later tokens change no label's probability, and
the last label itself is only a target.

Both collators give the same keys, so the loss does not depend on which one was used. Shapes: B rows in the batch (1 for a
tree), L tokens per row, N labelled positions.

    input_ids (B, L)       token ids
    position_ids (B, L)    each token's position in its own row
    sources (N,)           index into the flattened (B x L) hidden states of the token that predicts the label
    targets (N,)           the label's id
    weights (N,)           number of rows with this label at this position; 0 for the padding of a tree's labels (`tree.FILL`)
    labelled               labelled tokens, counted in every row (an int: no synchronisation with a GPU to count them)
    row_tokens             tokens of all rows as they are in the dataset (an int)
    tree_layout            a tree's nodes, for attention (tree only)
    attention_mask (B, L)  1 for real tokens (padded only, and only if rows differ in length)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import (
    Limits,
    build_tree,
    computed_length,
    fill,
    filled,
    split_by_length,
    split_for_trees,
)
from tunesmith.models.families import runs_on_trees

Batch = dict[str, Any]
Owners = list[tuple[int, int]]  # (row, label) for each label of each row; a label that rows share occurs once per row
Rows = Sequence[Mapping[str, Any]]  # dataset rows: `input_ids`, and `loss_mask` of the same length


class Collator(Protocol):
    """Makes a batch from rows."""

    def __call__(self, rows: Rows) -> Batch:
        """The batch, with the keys that this module documents."""
        ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def computed_ids(row: Mapping[str, Any], side: str = "") -> Sequence[int]:
    """The row's tokens that go through the model; `side` is `rejected_` for the other side of a pair."""
    ids: Sequence[int] = row[f"{side}input_ids"]
    return ids[: computed_length(row[f"{side}loss_mask"])]


def collate_tree(rows: Rows) -> Batch:
    """The rows as one sequence in which each shared prefix occurs once."""
    return tree_with_owners(rows)[0]


def tree_with_owners(rows: Rows) -> tuple[Batch, Owners]:
    """`collate_tree`, and the labels of each row."""
    tree = fill(build_tree([computed_ids(row) for row in rows]))
    labels: dict[tuple[int, int], int] = {}  # (source, target): the label's index
    owners: Owners = []  # nothing predicts a row's first token
    for number, (row, path) in enumerate(zip(rows, tree.paths, strict=True)):
        following = zip(path, row["input_ids"][1:], row["loss_mask"][1:], strict=False)  # the row may be longer than its path
        places = [(source, target) for source, target, labelled in following if labelled]
        owners += [(number, labels.setdefault(place, len(labels))) for place in places]
    sources, targets = [source for source, _ in labels], [target for _, target in labels]
    count = Counter(label for _, label in owners)
    weights = [count[label] for label in range(len(labels))]
    more = filled(len(labels)) - len(labels)
    sources, targets, weights = (some + [0] * more for some in (sources, targets, weights))
    batch = {
        "input_ids": torch.tensor([tree.ids], dtype=torch.long),
        "position_ids": torch.tensor([tree.positions], dtype=torch.long),
        "sources": torch.tensor(sources, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "weights": torch.tensor(weights, dtype=torch.float32),
        "labelled": len(owners),
        "row_tokens": _row_tokens(rows),
        "tree_layout": Layout(tree.nodes, len(tree.ids)),
    }
    return batch, owners


def _row_tokens(rows: Rows) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def padded(ids: Sequence[Sequence[int]], pad_id: int | None) -> Batch:
    """A right-padded batch of rows: `input_ids`, `position_ids`, and a mask if their lengths differ.

    A tokenizer may have no pad id; then 0 is used, since padding is masked.
    """
    longest = max(map(len, ids))
    input_ids = torch.full((len(ids), longest), 0 if pad_id is None else pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for number, row in enumerate(ids):
        input_ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    batch: Batch = {"input_ids": input_ids, "position_ids": torch.arange(longest).expand(len(ids), -1).contiguous()}
    return batch if min(map(len, ids)) == longest else batch | {"attention_mask": mask}


class PaddedCollator:
    """Right-padded rows. Padding is found by the rows' lengths, so the pad token may equal eos."""

    def __init__(self, pad_id: int | None) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Rows) -> Batch:
        batch = padded([computed_ids(row) for row in rows], self.pad_id)
        longest = batch["input_ids"].shape[1]
        sources, targets = [], []
        for number, row in enumerate(rows):
            places = torch.tensor(row["loss_mask"], dtype=torch.bool)[1:].nonzero().flatten()
            sources.append(places + number * longest)
            targets.append(torch.tensor(row["input_ids"], dtype=torch.long)[1:][places])
        count = sum(map(len, targets))
        return batch | {
            "sources": torch.cat(sources),
            "targets": torch.cat(targets),
            "weights": torch.ones(count, dtype=torch.float32),
            "labelled": count,
            "row_tokens": _row_tokens(rows),
        }

    def with_owners(self, rows: Rows) -> tuple[Batch, Owners]:
        """The batch, and the labels of each row."""
        batch = self(rows)
        longest = batch["input_ids"].shape[1]
        return batch, [(source // longest, label) for label, source in enumerate(batch["sources"].tolist())]


class StepCollator:
    """Splits the rows of an optimizer step into micro-batches within the limits, each row into one of them.

    Rows that share a prefix are grouped. Padded rows are grouped by similar length to keep padding small.
    """

    def __init__(self, collate: Collator, limits: Limits) -> None:
        self.collate, self.limits = collate, limits

    def __call__(self, rows: Rows, /) -> dict[str, list[Batch]]:
        ids = [computed_ids(row) for row in rows]
        if isinstance(self.collate, PaddedCollator):
            groups = split_by_length([len(each) for each in ids], self.limits)
        else:
            groups = split_for_trees(ids, self.limits)
        return {"micro_batches": [self.collate([rows[index] for index in group]) for group in groups]}


def tree_unsupported_reason(config: Any, longest: int) -> str | None:
    """Why rows of up to `longest` tokens cannot be packed into a tree for this model, or None if they can."""
    if not runs_on_trees(config.model_type):
        return f"exactness is not proven for the architecture {config.model_type!r}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return f"rows of {longest} tokens reach beyond the sliding window of {window}"
    if getattr(config, "attention_dropout", 0.0):
        return "the model has attention dropout"
    return None


def choose_collator(config: Any, pad_id: int | None, longest: int) -> tuple[Collator, str | None]:
    """The tree collator if it is exact for this model, else the padded one and the reason for it."""
    reason = tree_unsupported_reason(config, longest)
    if reason is None:
        return collate_tree, None
    return PaddedCollator(pad_id), reason
