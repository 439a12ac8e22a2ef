"""Cross-entropy over labelled positions only: logits are computed only for hidden states that predict a label.

Shapes: B rows, L tokens, H hidden size, V vocabulary, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.engine.modeling.chunks import HEAD_ROWS, IN_PLACE, chunk_rows
from tunesmith.engine.modeling.gemm import across_rows, by_onednn, linear
from tunesmith.engine.modeling.places import hidden_at
from tunesmith.kernels import triton
from tunesmith.kernels.cpu import cross_entropy as kernel
from tunesmith.kernels.cpu.library import computes
from tunesmith.models.head import causal_of, logits_of, own_logits, soft_cap

_NOT_INPUTS = ("sources", "targets", "weights", "labelled", "row_tokens", "owner_rows", "owner_labels", "reference")


def labelled_hidden(causal: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """(N, H) hidden states at the positions in `sources`."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
    return hidden_at(causal.get_decoder(), inputs, batch["sources"])


def labelled_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits (N, V) at the positions in `sources`, from the decoder's hidden states of the whole batch.

    `model` is a transformers causal language model, with or without a PEFT wrapper.
    """
    causal = causal_of(model)
    logits: torch.Tensor
    if own_logits(causal):
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        logits = causal(**inputs, use_cache=False).logits.flatten(0, 1)[batch["sources"]]
    else:
        logits = logits_of(causal, labelled_hidden(causal, batch))
    return logits


def logits_in_chunks(model: Any, batch: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """`labelled_logits` without gradients, `chunk_rows` positions at a time: the first position's index, logits (positions, V).

    A model that changes its logits computes all of them in its own forward: each row at each column that any row needs.
    """
    causal = causal_of(model)
    if own_logits(causal):
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        width = batch["input_ids"].shape[1]
        columns, which = torch.unique(batch["sources"] % width, return_inverse=True)
        logits = causal(**inputs, use_cache=False, logits_to_keep=columns).logits  # (B, columns, V)
        yield 0, logits[batch["sources"] // width, which]
        return
    hidden = labelled_hidden(causal, batch)
    size = chunk_rows(causal.get_output_embeddings().weight.shape[0])
    for begin in range(0, len(hidden), size):
        yield begin, logits_of(causal, hidden[begin : begin + size])


def exact_logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits (positions, V) of hidden states (positions, H), in float32 (float64 if they are); a new buffer, without autograd.

    oneDNN's are (V, positions) in memory: it reorders its weight argument, which then is the hidden states and not the head.
    """
    if by_onednn(hidden, head):
        logits = linear(head, hidden).T
        return logits if bias is None else logits.add_(bias)
    return linear(hidden, head, bias).to(torch.promote_types(hidden.dtype, torch.float32))


def one_pass(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, cap: float | None) -> bool:
    """Whether a custom kernel computes a frozen head's loss without materialising logits (kernels/cpu/cross_entropy.cpp)."""
    return bias is None and cap is None and computes(kernel, hidden, head)


def in_place(hidden: torch.Tensor, head: torch.Tensor, cap: float | None) -> bool:
    """Whether kernels/triton/cross_entropy.py overwrites logits with their gradients, without a float32 copy."""
    return cap is None and triton.computes(hidden, head)


def _places_at_once(hidden: torch.Tensor, head: torch.Tensor, cap: float | None) -> int:
    """Positions per chunk of logits: no more bytes than the plan counts."""
    small = hidden.element_size() == 2 and in_place(hidden, head, cap)
    return chunk_rows(len(head)) * (IN_PLACE if small else 1)


def _chunk(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    cap: float | None,
    with_grad: bool,
) -> tuple[torch.Tensor, Any]:
    """Loss of a chunk, and its gradient with respect to the logits in the dtype of `hidden`; uses one buffer of logits."""
    if in_place(hidden, head, cap):
        from tunesmith.kernels.triton import cross_entropy  # needs Triton

        logits = linear(hidden, head, bias)
        losses = cross_entropy.from_logits(logits, targets, weights if with_grad else None)
        return losses @ weights, logits if with_grad else None
    logits = exact_logits(hidden, head, bias)
    if cap is None and logits.dtype == hidden.dtype and logits.T.is_contiguous() and computes(kernel, logits):
        losses = kernel.from_logits(logits.T, targets, weights if with_grad else None)
        return losses @ weights, logits if with_grad else None
    bent = None if cap is None else logits.div_(cap).tanh_()
    logits = logits if cap is None or bent is None else bent * cap
    picked = targets.unsqueeze(-1)
    right, top = logits.gather(-1, picked), logits.amax(-1, keepdim=True)
    sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
    weights = weights.unsqueeze(-1)
    loss = ((sums.log() + top - right) * weights).sum()
    if not with_grad:
        return loss, None
    grad_logits = logits.mul_(weights / sums).scatter_add_(-1, picked, -weights)
    if bent is not None:
        grad_logits *= bent.square_().neg_().add_(1)  # the derivative of tanh
    return loss, grad_logits.to(hidden.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over i of -weights_i log softmax(cap(h_i W^T + bias))[target_i]; the forward computes gradients too, chunk by chunk.

    For a frozen head, a custom kernel, if available, makes one pass over it.

    Kept for the backward pass: the gradient of the hidden states (N, H), and of W (V, H, float32) and bias if they are
    trained; never logits (as in Liger's and torch's fused losses, but with a weight per position).
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        cap: float | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(exact)
        context.made, context.dtypes = (None, None, None), (head.dtype, None if bias is None else bias.dtype)
        if not context.needs_input_grad[1] and one_pass(hidden, head, bias, cap):
            if not with_gradients:
                return kernel.cross_entropy(hidden, head, targets) @ weights
            losses, into = kernel.with_gradient(hidden, head, targets, weights)
            context.made = (into, None, None)
            return losses @ weights
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_head = torch.empty_like(head, dtype=exact) if with_gradients and context.needs_input_grad[1] else None
        if grad_head is not None and not len(hidden):
            grad_head.zero_()
        grad_bias = torch.zeros_like(bias, dtype=exact) if with_gradients and bias is not None and bias.requires_grad else None
        size = _places_at_once(hidden, head, cap)
        for begin in range(0, len(hidden), size):
            part = slice(begin, begin + size)
            loss, grad_logits = _chunk(hidden[part], head, bias, targets[part], weights[part], cap, with_gradients)
            total += loss
            if grad_hidden is not None:
                grad_hidden[part] = across_rows(grad_logits.T, head)
            if grad_head is not None:
                for some in range(0, len(head), HEAD_ROWS):  # the whole GEMM's result would be as large as the head
                    rows = slice(some, some + HEAD_ROWS)
                    made = across_rows(grad_logits[:, rows], hidden[part])
                    if begin == 0:
                        grad_head[rows] = made
                    else:
                        grad_head[rows].add_(made)
                    del made
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=exact)
            del loss, grad_logits  # frees them before the next chunk is computed
        context.made = (grad_hidden, grad_head, grad_bias)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        grad_hidden, grad_head, grad_bias = context.made
        context.made = (None, None, None)
        head_dtype, bias_dtype = context.dtypes
        grad_hidden = grad_hidden.mul_(gradient)
        grad_head = None if grad_head is None else grad_head.mul_(gradient).to(head_dtype)
        grad_bias = None if grad_bias is None else grad_bias.mul_(gradient).to(bias_dtype)
        return grad_hidden, grad_head, grad_bias, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    cap: float | None,
) -> torch.Tensor:
    """Sum over i of -weights_i log softmax(cap(h_i W^T + bias))[target_i]; backward can run once."""
    fused: Any = _LinearCrossEntropy  # torch leaves `apply` untyped
    loss: torch.Tensor = fused.apply(hidden, head, bias, targets, weights, cap, torch.is_grad_enabled())
    return loss


def summed_loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Sum over the labelled tokens of all rows of -log p(token | tokens before it), in nats, a float32 scalar.

    A label that several rows share counts once per row, as if the rows had been computed one by one. It is float64
    if the model is, so that tests can be exact. Backward can run once.
    """
    causal = causal_of(model)
    targets, weights = batch["targets"], batch["weights"]
    loss: torch.Tensor
    if own_logits(causal):
        logits = labelled_logits(model, batch)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = (F.cross_entropy(exact, targets, reduction="none") * weights).sum()
    else:
        head = causal.get_output_embeddings()
        hidden = labelled_hidden(causal, batch)
        bias = getattr(head, "bias", None)
        loss = linear_cross_entropy(hidden, head.weight, bias, targets, weights, soft_cap(causal))
    return loss


class LossModel(torch.nn.Module):
    """A causal language model whose forward is `summed_loss`, so that wrappers (DDP) can hook it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> torch.Tensor:
        """The summed loss of one batch."""
        return summed_loss(self.model, batch)
