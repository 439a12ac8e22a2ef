"""Custom CPU kernels against PyTorch's equivalents in float32, alternating call by call.

    python benchmarks/native_kernels.py --json benchmarks/results/kernels.json      # a minute on two cores

Tree attention against PyTorch's flash kernel, block by block; norms, SwiGLU and rotary embedding against
torch's operators; the loss with a frozen head against torch's `linear_cross_entropy`, and the loss with stored logits against
torch's operators. Shapes are those of the built-in model. The result is the median of the ratios of consecutive calls; above 1,
the custom kernel is faster.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import claim, in_turn, parser, report

from tunesmith.engine.attention.tree_torch import blocks_backward, blocks_forward
from tunesmith.engine.modeling.gemm import linear
from tunesmith.engine.packing.tree import Node, as_numbers
from tunesmith.hardware.allocators import steady_memory
from tunesmith.kernels import cpu
from tunesmith.kernels.cpu import cross_entropy, tree_attention
from tunesmith.kernels.dispatch import EAGER, OWN

HEADS, SHARED, SIZE, HIDDEN, WIDTH = 9, 3, 64, 576, 1536
TOKENS, PLACES, VOCABULARY = 2560, 640, 49152
CALLS = 25


def tree(root: int, leaves: list[int]) -> list[Node]:
    """Rows that share only their first tokens."""
    nodes, at = [Node(0, root, root + sum(leaves))], root
    for leaf in leaves:
        nodes.append(Node(at, at + leaf, at + leaf))
        at += leaf
    return nodes


#: Lengths as in the demo's data and in alpaca_demo, and one long document.
TREES = {
    "long instruction": tree(211, [25 + 7 * n % 36 for n in range(16)]),
    "system turn": tree(24, [40 + 53 * n % 260 for n in range(16)]),
    "one document": [Node(0, 2048, 2048)],
}


def row_of(kernel: str, case: str, theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, Any]:
    """The times of both, and the median ratio."""
    taken = in_turn(theirs, ours, CALLS)
    row = {
        "kernel": kernel,
        "case": case,
        "torch_seconds": statistics.median(one for one, _ in taken),
        "own_seconds": statistics.median(other for _, other in taken),
        "time_ratio": statistics.median(one / other for one, other in taken),
    }
    print(json.dumps(row), flush=True)
    return row


def attention() -> list[dict[str, Any]]:
    """Forward and backward along each tree."""
    rows = []
    for name, nodes in TREES.items():
        tokens = max(node.end for node in nodes)
        query, key, value, gradient = (
            torch.randn(tokens, heads, SIZE).transpose(0, 1) for heads in (HEADS, SHARED, SHARED, HEADS)
        )
        inputs, scale = (query, key, value), SIZE**-0.5
        table = tree_attention.table(as_numbers(nodes))
        made = tree_attention.forward(*inputs, table, scale)
        rows.append(
            row_of(
                "attention",
                name,
                partial(blocks_forward, *inputs, nodes, scale),
                partial(tree_attention.forward, *inputs, table, scale),
            )
        )
        rows.append(
            row_of(
                "attention backward",
                name,
                partial(blocks_backward, *inputs, gradient, *made, nodes, scale),
                partial(tree_attention.backward, *inputs, gradient, *made, table, scale),
            )
        )
    return rows


def numbers() -> list[dict[str, Any]]:
    """The elementwise operators and norms of a block."""
    x, gradient, weight = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    gate, up, grad = (torch.randn(TOKENS, WIDTH) for _ in range(3))
    query = torch.randn(1, TOKENS, HEADS, SIZE).transpose(1, 2)
    cos, sin = (torch.randn(1, 1, TOKENS, SIZE) for _ in range(2))
    root = EAGER.norm(x, weight, 1e-5, 0.0)[1]
    cases: dict[str, Callable[[Any], Any]] = {
        "norm": lambda k: k.norm(x, weight, 1e-5, 0.0),
        "norm backward": lambda k: k.norm_backward(gradient, x, root, weight, 0.0, False),
        "norm backward with weight": lambda k: k.norm_backward(gradient, x, root, weight, 0.0, True),
        "gated": lambda k: k.gated(gate, up, "silu"),
        "gated backward": lambda k: k.gated_backward(grad, gate, up, "silu"),
        "rotary": lambda k: k.rotary(query, cos, sin, False),
    }
    return [row_of(name, f"{TOKENS} tokens", partial(case, EAGER), partial(case, OWN)) for name, case in cases.items()]


def in_six_passes(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss with stored logits (N, V), which its gradients overwrite, by torch's operators."""
    picked, weights = targets.unsqueeze(-1), weights.unsqueeze(-1)
    right, top = logits.gather(-1, picked), logits.amax(-1, keepdim=True)
    sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
    logits.mul_(weights / sums).scatter_add_(-1, picked, -weights)
    return ((sums.log() + top - right) * weights).sum()


def losses() -> list[dict[str, Any]]:
    """The loss with a frozen head and its gradient for the hidden states, and the loss with stored logits."""
    hidden, head = torch.randn(PLACES, HIDDEN), torch.randn(VOCABULARY, HIDDEN) / HIDDEN
    targets, weights = torch.randint(VOCABULARY, (PLACES,)), torch.rand(PLACES)
    leaf = hidden.clone().requires_grad_()

    def by_torch() -> None:
        with torch.enable_grad():
            torch.autograd.grad(F.linear_cross_entropy(leaf, head, targets, reduction="sum"), leaf)

    ours = partial(cross_entropy.with_gradient, hidden, head, targets, weights)
    one, other = (linear(head, hidden) for _ in range(2))  # (V, N), as in the engine
    return [
        row_of("loss of a frozen head", f"{PLACES} places", by_torch, ours),
        row_of(
            "loss of kept logits",
            f"{PLACES} places",
            partial(in_six_passes, one.T, targets, weights),
            partial(cross_entropy.from_logits, other, targets, weights),
        ),
    ]


def main() -> None:
    """Measure each kernel and write the ratios."""
    asked = parser(__doc__ or "").parse_args()
    reason = cpu.unsupported_reason()
    if reason is not None:
        raise SystemExit(f"there are no custom kernels here: {reason}")
    steady_memory()
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [*attention(), *numbers(), *losses()]

    def median(*kernels: str) -> float:
        return statistics.median(row["time_ratio"] for row in rows if row["kernel"] in kernels)

    claims = [
        claim("attention_time_ratio", median("attention"), "x"),
        claim("attention_backward_time_ratio", median("attention backward"), "x"),
        claim("number_by_number_time_ratio", median("norm", "norm backward", "gated", "gated backward", "rotary"), "x"),
        claim("norm_with_weight_backward_time_ratio", median("norm backward with weight"), "x"),
        claim("frozen_head_loss_time_ratio", median("loss of a frozen head"), "x"),
        claim("kept_logits_loss_time_ratio", median("loss of kept logits"), "x"),
    ]
    report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
