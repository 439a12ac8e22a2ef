"""The fixed cost of a micro-batch, in tokens of equal time: measures `methods.settings.MICRO_BATCH_START`.

    python benchmarks/micro_batches.py --json benchmarks/results/micro_batches.json      # ten minutes on two cores

Forward and backward passes of the built-in model over rows of 240 tokens, 1 to 8 per micro-batch, the sizes in turns, with
lengths that were seen before. Least squares over the medians: seconds = a x tokens + b per micro-batch; b / a is claimed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from common import claim, parser, report

from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.packing.batch import Batch, collate_tree
from tunesmith.hardware import detect
from tunesmith.hardware.allocators import steady_memory
from tunesmith.methods import make_method
from tunesmith.models import builtin
from tunesmith.models.builtin import NAME
from tunesmith.recipe import Recipe
from tunesmith.stages.train.losses import TokenLoss

METHODS = ("full", "lora", "qlora")
LENGTH = 240  # of a row, its second half labelled
AT_ONCE = (1, 2, 4, 8)
TURNS = 5
R = 16


def batches() -> Mapping[int, Batch]:
    """Random rows, by rows per micro-batch."""
    draw = random.Random(0)
    trained = [place >= LENGTH // 2 for place in range(LENGTH)]
    made = {}
    for count in AT_ONCE:
        ids = ([draw.randrange(49_000) for _ in range(LENGTH)] for _ in range(count))
        made[count] = collate_tree([{"input_ids": each, "loss_mask": trained} for each in ids])
    return made


def seconds(method: str, dtype: str) -> dict[int, list[float]]:
    """Seconds of each turn, by tokens per micro-batch; the first turn, which compiles GEMMs, is excluded."""
    recipe = Recipe.model_validate({"model": NAME, "method": method, "data": {"train": "rows"}})
    model = make_method(recipe, builtin.ensure(), compute_dtype=dtype, r=R, lora_alpha=2 * R).build()
    use_tree_attention(model, on=True)
    loss_model = TokenLoss().loss_model(model)
    taken: dict[int, list[float]] = {LENGTH * count: [] for count in AT_ONCE}
    given = batches()
    for turn in range(TURNS + 1):
        for count, batch in given.items():
            begun = time.perf_counter()
            TokenLoss().read(loss_model(**batch))[0].backward()
            if turn > 0:
                taken[LENGTH * count].append(time.perf_counter() - begun)
    return taken


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    steady_memory()
    claims: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for dtype in sorted({"float32", detect().compute_dtype}):
            taken = seconds(method, dtype)
            medians = [statistics.median(each) for each in taken.values()]
            token, start = np.polyfit(list(taken), medians, 1)
            claims.append(claim(f"micro_batch_start_{method}_{dtype}", float(start / token), "tokens"))
            rows.append({"part": f"{method}-{dtype}", "seconds": taken})
            print(rows[-1], flush=True)
            report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
