"""The difference between gradients of prefix trees and of padded rows: float64, random trees, five architectures."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.models import (
    CONFIGS,
    VOCABULARY,
    exact_model,
    fused_model,
    loss_and_gradients,
    transformers_loss,
    with_gradients,
)

from tunesmith.engine.packing.batch import collate_tree

TREES = 40


def random_rows(generator: random.Random) -> list[dict[str, Any]]:
    """Random rows that share prefixes."""
    stems = [[generator.randrange(1, VOCABULARY) for _ in range(generator.randrange(1, 30))]]
    for _ in range(3):
        stems.append(generator.choice(stems) + [generator.randrange(1, VOCABULARY) for _ in range(generator.randrange(20))])
    rows = []
    for _ in range(generator.randrange(2, 9)):
        ids = generator.choice(stems) + [generator.randrange(1, VOCABULARY) for _ in range(generator.randrange(1, 16))]
        rows.append({"input_ids": ids, "loss_mask": [generator.random() < 0.5 for _ in ids[:-1]] + [True]})
    return rows


def largest_difference() -> dict[str, float]:
    """For each architecture, the largest |difference| / |gradient| (2-norms) of any parameter in any tree."""
    found = {}
    for name in CONFIGS:
        theirs, mine = exact_model(name), fused_model(name)
        generator, worst = random.Random(0), 0.0
        for _ in range(TREES):
            rows = random_rows(generator)
            _, wanted = with_gradients(theirs, lambda theirs=theirs, rows=rows: transformers_loss(theirs, rows))
            _, made = loss_and_gradients(mine, collate_tree(rows), tree=True)
            for parameter, gradient in wanted.items():
                difference = torch.linalg.vector_norm(made[parameter] - gradient) / torch.linalg.vector_norm(gradient)
                worst = max(worst, float(difference))
        found[name] = worst
    return found


if __name__ == "__main__":
    print(largest_difference())
