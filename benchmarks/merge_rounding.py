"""How much of a training survives rounding of the merged weights: to nearest bf16 or fp16, or stochastically to bf16.

Takes trained runs, merges each in float32, rounds the merged weights each way and compares predictions with the checkpoint's
on labelled tokens of training rows.

    .venv/bin/python benchmarks/merge_rounding.py runs/demo/full runs/demo/lora runs/demo/qlora --json FILE
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import claim, parser, report
from datasets import Dataset

from tunesmith.engine.optim.rounding import round_stochastically
from tunesmith.runs import open_run
from tunesmith.stages.export.stage import compare_probabilities, log_probabilities, trained_method

PROBE_ROWS = 32


def ways(seed: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The rounding functions, each from float32 to float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "none (float32)": lambda value: value,
        "nearest bfloat16": lambda value: value.bfloat16().float(),
        "nearest float16": lambda value: value.half().float(),
        "stochastic bfloat16": lambda value: round_stochastically(value, generator).float(),
    }


def measure(path: Path) -> list[dict[str, Any]]:
    """One row for each way of rounding a run's merged weights."""
    run = open_run(path)
    method, checkpoint = trained_method(run)
    data = Dataset.from_file(str(run.path / "data" / "train.arrow"))
    rows = data.select(range(min(PROBE_ROWS, len(data))))
    trained = method.load_trained(checkpoint)
    expected = log_probabilities(trained, rows)
    merged = method.merge(trained)
    exact = {name: parameter.detach().clone() for name, parameter in merged.named_parameters()}
    results = []
    for name, rounding in ways(run.recipe.seed).items():
        for key, parameter in merged.named_parameters():
            parameter.data = rounding(exact[key])
        results.append(
            {"method": method.name, "rounding": name, **compare_probabilities(expected, log_probabilities(merged, rows))}
        )
    return results


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("runs", type=Path, nargs="+", help="trained run folders")
    arguments = options.parse_args()
    rows = [row for path in arguments.runs for row in measure(path)]
    claims = []
    for row in rows:
        slug = row["rounding"].split(" (")[0].replace(" ", "_")
        claims.append(claim(f"{row['method']}_{slug}_mean_kl", row["mean_kl"], "nats/token"))
        claims.append(claim(f"{row['method']}_{slug}_loss_change", row["exported_loss"] - row["trained_loss"], "nats/token"))
    report(arguments.json, claims, rows)


if __name__ == "__main__":
    main()
