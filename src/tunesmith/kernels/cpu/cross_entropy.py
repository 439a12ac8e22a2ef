"""Cross-entropy with the kernels in cross_entropy.cpp: of a frozen head, and of materialised logits.

Shapes: N positions, H hidden size, V vocabulary. All tensors but the targets are float32, or all float64.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from tunesmith.kernels.cpu import library
from tunesmith.kernels.cpu.library import call, dense_rows, own_graph

DTYPES = {torch.float32: "float", torch.float64: "double"}


@cache
def unsupported_reason() -> str | None:
    """Why the kernel is unsupported here, or None; the first call compiles it and tests it on small tensors."""
    return library.unsupported_reason("cross_entropy", _gives_what_it_should)


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(h W^T)[target] of each position (N), for hidden (N, H), head (V, H) and targets (N).

    Raises IndexError for a target outside the vocabulary, MemoryError if memory is too small.
    """
    return _losses(hidden, head, targets, None, None)


def with_gradient(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the gradient (N, H) for `hidden` of their sum weighted by `weights` (N)."""
    grad_hidden = hidden.new_empty(hidden.shape)
    return _losses(hidden, head, targets, weights.contiguous(), grad_hidden), grad_hidden


def from_logits(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The same of contiguous logits (V, N).

    If `weights` (N) are given, the logits are overwritten by their gradients of the sum weighted by those.
    """
    targets = _in_vocabulary(targets, len(logits))
    losses, last = logits.new_empty(logits.shape[1]), ctypes.c_void_p(None) if weights is None else weights.contiguous()
    given = (logits, targets, last, losses, logits.shape[1], len(logits))
    if call("cross_entropy", f"from_logits_{DTYPES[logits.dtype]}", *given) != 0:
        raise MemoryError("too little memory for the loss")
    return losses


def _in_vocabulary(targets: torch.Tensor, size: int) -> torch.Tensor:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < size:
        raise IndexError(f"a target is outside the vocabulary of {size} tokens")
    return targets.contiguous()


def _losses(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    grad_hidden: torch.Tensor | None,
) -> torch.Tensor:
    hidden, head, targets = dense_rows(hidden), head.contiguous(), _in_vocabulary(targets, len(head))
    losses, none = hidden.new_empty(len(hidden)), ctypes.c_void_p(None)
    given = (hidden, hidden.stride(0), head, targets, none if weights is None else weights)
    made = (losses, none if grad_hidden is None else grad_hidden)
    if call("cross_entropy", f"cross_entropy_{DTYPES[hidden.dtype]}", *given, *made, *hidden.shape, len(head)) != 0:
        raise MemoryError("too little memory for the loss")
    return losses


def _gives_what_it_should() -> bool:
    """Whether small losses and gradients match torch's operators, in both dtypes."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        draw = torch.Generator().manual_seed(0)
        hidden, head = (torch.randn((count, 37), generator=draw, dtype=dtype) for count in (20, 300))
        targets, weights = torch.arange(0, 300, 15), torch.linspace(0, 2, 20, dtype=dtype)
        with own_graph():
            leaf = hidden.clone().requires_grad_()
            logits = leaf @ head.T
            expected = F.cross_entropy(logits, targets, reduction="none")
            grad_leaf, grad_logits = torch.autograd.grad((expected * weights).sum(), (leaf, logits))
        with torch.no_grad():
            kept = logits.T.contiguous()
            found = (*with_gradient(hidden, head, targets, weights), from_logits(kept, targets, weights), kept.T)
        pairs = zip(found, (expected, grad_leaf, expected, grad_logits), strict=True)
        if not all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs):
            return False
    return True
