"""Float32 GEMMs of a block and of a head: by torch's library and by oneDNN, alternating call by call.

    python benchmarks/gemm.py --json benchmarks/results/gemm.json      # half a minute on two cores

The result is the median of the ratios of consecutive calls; above 1, oneDNN is faster. Shapes are those of the built-in
model: forward (x W^T), input gradient (g W), and a head's logits.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import claim, in_turn, parser, report

from tunesmith.engine.modeling.gemm import linear

ROWS = (592, 1312, 2048, 2560)
BLOCK = ((576, 1536), (1536, 576), (576, 576), (576, 192))  # in, out
HEAD = (576, 49152)
CALLS = 25

Product = Callable[[], torch.Tensor]


def compared(theirs: Product, ours: Product, flops: int, calls: int = CALLS) -> dict[str, float]:
    """The rates of both, and the median ratio of their times."""
    taken = in_turn(theirs, ours, calls)
    return {
        "torch_flops_per_second": flops / statistics.median(one for one, _ in taken),
        "onednn_flops_per_second": flops / statistics.median(other for _, other in taken),
        "time_ratio": statistics.median(one / other for one, other in taken),
    }


def main() -> None:
    """Measure each shape and write the results."""
    asked = parser(__doc__ or "").parse_args()
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    for count in ROWS:
        for into, out in BLOCK:
            x, gradient, weight = torch.randn(count, into), torch.randn(count, out), torch.randn(out, into)
            flops = 2 * count * into * out
            for name, theirs, ours in (
                ("x W^T", lambda x=x, w=weight: torch.nn.functional.linear(x, w), lambda x=x, w=weight: linear(x, w)),
                ("g W", lambda g=gradient, w=weight: g @ w, lambda g=gradient, w=weight: linear(g, w.T)),
            ):
                rows.append({"product": name, "rows": count, "in": into, "out": out, **compared(theirs, ours, flops)})
                print(json.dumps(rows[-1]), flush=True)
    into, out = HEAD
    hidden, head = torch.randn(ROWS[0], into), torch.randn(out, into)
    made = compared(lambda: hidden @ head.T, lambda: linear(hidden, head), 2 * ROWS[0] * into * out, 9)
    print(json.dumps(made), flush=True)
    ratios = [row["time_ratio"] for row in rows]
    rows.append({"product": "logits", "rows": ROWS[0], "in": into, "out": out, **made})
    claims = [
        claim("onednn_time_ratio_median", statistics.median(ratios), "x"),
        claim("onednn_time_ratio_least", min(ratios), "x"),
        claim("onednn_time_ratio_most", max(ratios), "x"),
        claim("onednn_time_ratio_logits", made["time_ratio"], "x"),
    ]
    report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
