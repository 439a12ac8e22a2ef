"""Preference pairs shared by several tests."""

from __future__ import annotations

from typing import Any

from tests.conftest import COLOURS


def pair_row(number: int) -> dict[str, Any]:
    """A raw row: a question about a thing's colour; the preferred answer is short, the other one polite and wrong."""
    right, wrong = COLOURS[number % 8], COLOURS[(number + 3) % 8]
    question = f"Which colour is thing number {number}{', tell me please' * (number % 5)}?"
    return {"prompt": question, "chosen": right, "rejected": f"Well, I would say {wrong}{', perhaps' * (number % 3)}."}


PAIRS = [pair_row(number) for number in range(40)]


def sides(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both sides of dataset pairs as plain rows, the chosen ones first."""
    chosen = [{"input_ids": pair["input_ids"], "loss_mask": pair["loss_mask"]} for pair in pairs]
    return chosen + [{"input_ids": pair["rejected_input_ids"], "loss_mask": pair["rejected_loss_mask"]} for pair in pairs]
