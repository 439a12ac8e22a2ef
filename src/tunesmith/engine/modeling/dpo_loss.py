"""Direct preference optimization over pairs of rows: batches, log-probabilities, loss (Rafailov et al. 2023, arXiv 2305.18290).

A pair is a dataset row with a chosen side (`input_ids`, `loss_mask`) and a rejected one (`rejected_input_ids`,
`rejected_loss_mask`). The sides of all pairs of a micro-batch are rows of one prefix tree, so the shared prompt is computed
once; or they are padded.

Shapes: P pairs, R = 2 P rows (the chosen ones first), N labelled positions, M >= N (row, label) pairs, H hidden size,
V vocabulary. In addition to the keys of `batch`, a batch of pairs has

    owner_rows, owner_labels (M,)   row owner_rows[m] has the label owner_labels[m]; a position may belong to several rows
    reference (2, P)                reference log-probabilities of both sides, float64; absent while they are computed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tunesmith.engine.modeling.chunks import chunk_rows
from tunesmith.engine.modeling.loss import exact_logits, labelled_hidden, labelled_logits, linear_cross_entropy, one_pass
from tunesmith.engine.packing.batch import Batch, Collator, PaddedCollator, Rows, computed_ids, to_device, tree_with_owners
from tunesmith.engine.packing.tree import Limits, split_by_length, split_units_for_trees
from tunesmith.kernels.cpu import cross_entropy as kernel
from tunesmith.models.head import causal_of, own_logits, soft_cap

_WINDOW = 256  # pairs packed together in a pass over the whole dataset


class PairCollator:
    """Splits the pairs of an optimizer step into micro-batches within the limits, both sides of a pair in the same one.

    `limits.rows` counts pairs. Pairs that share a prefix are grouped; padded pairs are grouped by similar length.
    """

    def __init__(self, collate: Collator, limits: Limits) -> None:
        self.padded = collate if isinstance(collate, PaddedCollator) else None
        self.limits = limits

    def __call__(self, pairs: Rows, /) -> dict[str, list[Batch]]:
        return {"micro_batches": [self.collate([pairs[index] for index in group]) for group in self.split(pairs)]}

    def split(self, pairs: Rows) -> list[list[int]]:
        """Indices of the pairs of each micro-batch."""
        units = [(computed_ids(pair), computed_ids(pair, "rejected_")) for pair in pairs]
        if self.padded is not None:
            return split_by_length([max(map(len, unit)) for unit in units], self.limits, rows=2)
        return split_units_for_trees(units, self.limits)

    def collate(self, pairs: Rows) -> Batch:
        """One micro-batch of the pairs, with the reference log-probabilities if the pairs have them."""
        chosen = [{"input_ids": pair["input_ids"], "loss_mask": pair["loss_mask"]} for pair in pairs]
        rejected = [{"input_ids": pair["rejected_input_ids"], "loss_mask": pair["rejected_loss_mask"]} for pair in pairs]
        with_owners = tree_with_owners if self.padded is None else self.padded.with_owners
        batch, owners = with_owners([*chosen, *rejected])
        rows, labels = torch.tensor(owners, dtype=torch.long).view(-1, 2).unbind(1)
        batch |= {"owner_rows": rows, "owner_labels": labels}
        if "reference" in pairs[0]:
            batch["reference"] = torch.tensor([pair["reference"] for pair in pairs], dtype=torch.float64).T
        return batch


def pair_count(batch: Batch) -> int:
    """Number of pairs in the batch."""
    return int(batch["reference"].shape[1])


class _LabelLogProbs(torch.autograd.Function):
    """log softmax(cap(h_i W^T + bias))[target_i] for each i, (N,) in float32 (float64 if `hidden` is).

    Logits are computed chunk by chunk, and recomputed in the backward pass. That pass needs the gradient of the loss with
    respect to each log-probability, which depends on sums over whole rows and is known only after the last chunk. It is
    cross-entropy with that gradient as weights. Saved for the backward pass: the hidden states (N, H). With a custom kernel,
    neither pass materialises logits.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        cap: float | None,
    ) -> torch.Tensor:
        context.save_for_backward(hidden, head, bias, targets)
        context.cap = cap
        if one_pass(hidden, head, bias, cap):
            return kernel.cross_entropy(hidden, head, targets).neg_()
        exact = torch.promote_types(hidden.dtype, torch.float32)
        parts = [torch.empty(0, dtype=exact, device=hidden.device)]
        for begin in range(0, len(hidden), chunk_rows(len(head))):
            part = slice(begin, begin + chunk_rows(len(head)))
            logits = exact_logits(hidden[part], head, bias)
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            right, top = logits.gather(-1, targets[part].unsqueeze(-1)), logits.amax(-1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
            parts.append((right - top - sums.log()).squeeze(-1))
            del logits  # frees it before the next chunk is computed
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        *given, targets = context.saved_tensors
        needed = context.needs_input_grad[:3]
        inputs: list[Any] = [
            each if each is None else each.detach().requires_grad_(need) for each, need in zip(given, needed, strict=True)
        ]
        hidden, head, bias = inputs
        with torch.enable_grad():
            loss = linear_cross_entropy(hidden, head, bias, targets, -gradient, context.cap)
        wanted = [each for each, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(loss, wanted))
        return *(next(found) if need else None for need in needed), None, None


def label_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """(N,) log-probabilities of the labels, in nats, in float32 (float64 if the model is), differentiable."""
    causal = causal_of(model)
    if own_logits(causal):
        logits = labelled_logits(model, batch)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(exact, batch["targets"], reduction="none")
    head, hidden = causal.get_output_embeddings(), labelled_hidden(causal, batch)
    fused: Any = _LabelLogProbs  # torch leaves `apply` untyped
    logprobs: torch.Tensor = fused.apply(hidden, head.weight, getattr(head, "bias", None), batch["targets"], soft_cap(causal))
    return logprobs


def row_logprobs(model: Any, batch: Batch, pairs: int) -> torch.Tensor:
    """(2, P) log-probabilities of the chosen and the rejected answers, each the sum over its labels.

    Summed in float64, since the loss depends on small differences of these sums. Accumulated by index_put, whose order is
    deterministic on a GPU too, so the same seed gives the same bits.
    """
    logprobs = label_logprobs(model, batch)[batch["owner_labels"]].double()
    rows = torch.zeros(2 * pairs, dtype=torch.float64, device=logprobs.device)
    return rows.index_put((batch["owner_rows"],), logprobs, accumulate=True).view(2, pairs)


class Preference(NamedTuple):
    """Sums over the pairs of a batch: losses in nats, pairs whose chosen answer has the larger reward, reward margins."""

    loss: torch.Tensor
    right: torch.Tensor
    margin: torch.Tensor


def preference_loss(logprobs: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float) -> Preference:
    """The loss of pairs from their (2, P) log-probabilities under the model and under the reference.

    A reward is beta x (log p - log p_reference). The margin m of a pair is the chosen reward minus the rejected reward. The
    loss is -(1 - e) log sigmoid(m) - e log sigmoid(-m) with e the label smoothing (the paper's equation 7; e as in TRL).
    """
    rewards = beta * (logprobs - reference)
    margin = rewards[0] - rewards[1]
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return Preference(loss.sum(), (margin.detach() > 0).sum(), margin.detach().sum())


class PreferenceModel(torch.nn.Module):
    """A causal language model whose forward is the summed preference loss, so that wrappers (DDP) can hook it."""

    def __init__(self, model: Any, beta: float, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.beta, self.label_smoothing = model, beta, label_smoothing

    def forward(self, **batch: Any) -> Preference:
        """The sums of one batch of pairs."""
        logprobs = row_logprobs(self.model, batch, pair_count(batch))
        return preference_loss(logprobs, batch["reference"], self.beta, self.label_smoothing)


def sharing_order(pairs: Any, *, padded: bool) -> list[int]:
    """Indices of a dataset of pairs, with pairs that share a prefix next to each other; by length if pairs are padded."""
    if padded:
        keys: Sequence[Any] = [max(sides) for sides in zip(pairs["length"], pairs["rejected_length"], strict=True)]
    else:
        # Big-endian bytes sort like the ids and take 4 bytes per id.
        keys = [np.asarray(ids, dtype=">u4").tobytes() for ids in pairs["input_ids"]]
    return sorted(range(len(keys)), key=keys.__getitem__)


def reference_logprobs(model: Any, pairs: Any, collate: PairCollator) -> torch.Tensor:
    """(pairs, 2) log-probabilities of both sides of each pair of a dataset under the current model, in float64 on the CPU.

    Without gradients or dropout, with the same micro-batch limits as training.
    """
    found = torch.empty((len(pairs), 2), dtype=torch.float64)
    order = sharing_order(pairs, padded=collate.padded is not None)
    model.eval()
    for begin in range(0, len(order), _WINDOW):
        window = order[begin : begin + _WINDOW]
        rows = list(pairs.select(window))
        for group in collate.split(rows):
            batch = to_device(collate.collate([rows[index] for index in group]), model.device)
            with torch.no_grad():
                found[[window[index] for index in group]] = row_logprobs(model, batch, len(group)).T.cpu()
    return found
