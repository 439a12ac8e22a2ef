"""What a micro-batch takes beside its tokens, in tokens' time: the measured side of `methods.settings.MICRO_BATCH_START`.

    python benchmarks/micro_batches.py --json benchmarks/results/micro_batches.json      # half an hour on two cores

The same steps of alpaca_demo with at most 256, 512, 1024, 2048 and 4096 tokens at once, one process for each, in turns. Least
squares over all turns of a method: seconds = a x computed tokens + b x micro-batches; b / a is what is claimed.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import claim, parser, report
from train_side import LEARNING_RATE, read_rows
from train_speed import R, prepared, side_of

from tunesmith.hardware import detect
from tunesmith.methods.settings import MAX_TOKENS
from tunesmith.packing.batch import StepCollator, collate_tree
from tunesmith.packing.tree import SIZES, Limits

ROWS = 16  # of an optimizer step
TURNS = 4
SEED = 42


def counts(data: Path, size: int, steps: int) -> list[int]:
    """Micro-batches of each step, in the order in which the engine draws the rows."""
    rows = read_rows(data)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()
    collate = StepCollator(collate_tree, Limits(size))
    starts = range(0, steps * ROWS, ROWS)
    return [len(collate([rows[number] for number in drawn[start : start + ROWS]])["micro_batches"]) for start in starts]


def measured(data: Path, method: str, dtype: str, turns: int) -> list[dict[str, Any]]:
    """A row for each turn of each size, after a step that does not count."""
    sizes = (*SIZES, MAX_TOKENS)
    told = ["--data", str(data), "--method", method, "--rows", str(ROWS), "--micro", "1", "--r", str(R), "--seed", str(SEED)]
    rows = []
    with ExitStack() as stack:
        sides = []
        for size in sizes:
            sides.append(side_of("tunesmith", [*told, "--dtype", dtype, "--scratch", str(data), "--max-tokens", str(size)]))
            stack.callback(sides[-1].end)
            sides[-1].read()  # that it is ready
        for turn in range(turns + 1):
            for size, side in zip(sizes, sides, strict=True):
                answer = side.ask("1")
                if turn > 0:
                    row = {"tokens": answer["computed_tokens"], "micro_batches": counts(data, size, turn + 1)[turn]}
                    row |= {key: answer[key] for key in ("seconds", "peak_memory_bytes", "losses")}
                    rows.append({"part": f"{method}-{dtype}", "turn": turn, "max_tokens": size, **row})
    return rows


def start(rows: list[dict[str, Any]]) -> float:
    """Tokens' time of a micro-batch beside its tokens."""
    facts = np.array([[row["tokens"], row["micro_batches"]] for row in rows], dtype=float)
    token, micro = np.linalg.lstsq(facts, np.array([row["seconds"] for row in rows]), rcond=None)[0]
    return float(micro / token)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--turns", type=int, default=TURNS)
    asked = options.parse_args()
    claims, rows = [], []
    for method in LEARNING_RATE:
        for dtype in sorted({"float32", detect().compute_dtype}):
            with tempfile.TemporaryDirectory() as scratch:
                made = measured(prepared("alpaca", Path(scratch)), method, dtype, asked.turns)
            rows += made
            claims.append(claim(f"micro_batch_start_{method}_{dtype}", start(made), "tokens"))
            report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
