"""What the engine minimises: the loss model, its batches, and what the mean is over. It only knows this interface."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors.torch import save

from tunesmith.engine.modeling.dpo_loss import PairCollator, Preference, PreferenceModel, pair_count, reference_logprobs
from tunesmith.engine.modeling.loss import LossModel
from tunesmith.engine.packing.batch import Batch, Collator, Rows, StepCollator
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import write_bytes
from tunesmith.recipe import OBJECTIVES, DpoSection, Recipe

Sums = Mapping[str, torch.Tensor]  # figures of a batch, each summed over what `count` counts


class StepBatches(Protocol):
    """Makes the `micro_batches` of an optimizer step's rows, within limits that may be lowered."""

    limits: Limits

    def __call__(self, rows: Rows, /) -> dict[str, list[Batch]]:
        """The micro-batches, with each row in exactly one."""
        ...


class Loss(Protocol):
    """A loss over rows; its mean over the global batch is minimised."""

    def lengths(self, rows: Any) -> list[int]:
        """Tokens of each row's longest sequence."""
        ...

    def batches(self, collate: Collator, limits: Limits) -> StepBatches:
        """How the rows of a step become micro-batches."""
        ...

    def before(self, model: Any, rows: Any, batches: StepBatches, folder: Path, console: Console, /) -> tuple[Any, float]:
        """The dataset with what the loss needs from the untrained model, also stored in `folder`, and the seconds it took."""
        ...

    def loss_model(self, model: Any) -> torch.nn.Module:
        """A module whose forward returns what `read` takes."""
        ...

    def read(self, output: Any) -> tuple[torch.Tensor, Sums]:
        """The summed loss of a batch, and sums of the other figures that go into metrics.jsonl."""
        ...

    def count(self, batch: Batch) -> int:
        """How many items of this batch the mean is over."""
        ...


class TokenLoss:
    """Cross-entropy over labelled tokens: answers, or with `objective: pretrain` whole documents."""

    def lengths(self, rows: Any) -> list[int]:
        return list(rows["length"])

    def batches(self, collate: Collator, limits: Limits) -> StepBatches:
        return StepCollator(collate, limits)

    def before(self, _model: Any, rows: Any, *_: Any) -> tuple[Any, float]:
        return rows, 0.0  # nothing is needed from the untrained model

    def loss_model(self, model: Any) -> torch.nn.Module:
        return LossModel(model)

    def read(self, output: torch.Tensor) -> tuple[torch.Tensor, Sums]:
        return output, {}

    def count(self, batch: Batch) -> int:
        count: int = batch["labelled"]
        return count


class PairLoss:
    """The preference loss over pairs, against the model as it was before the first step.

    That model is the paper's reference: an adapter starts at zero, so it is the base, and with full fine-tuning it is the
    loaded weights. The loss only needs two numbers per pair from it, computed once before training. No second model is kept,
    and no step recomputes the reference.
    """

    def __init__(self, asked: DpoSection) -> None:
        self.asked = asked

    def lengths(self, rows: Any) -> list[int]:
        return list(map(max, rows["length"], rows["rejected_length"]))

    def batches(self, collate: Collator, limits: Limits) -> PairCollator:
        return PairCollator(collate, limits)

    def before(self, model: Any, rows: Any, batches: StepBatches, folder: Path, console: Console, /) -> tuple[Any, float]:
        """Computes the reference's log-probabilities of all rows. Raises TrainError if one is not finite."""
        if not isinstance(batches, PairCollator):
            raise AssertionError("pairs are packed by the collator from `batches`")
        begun = time.perf_counter()
        console.print(f"reference: log-probabilities of {len(rows)} pairs under the untrained model")
        found = reference_logprobs(model, rows, batches)
        bad = (~found.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise TrainError(_reference_problem(rows[bad[0]]["where"], len(bad)))
        write_bytes(folder / "reference.safetensors", save({"chosen": found[:, 0].clone(), "rejected": found[:, 1].clone()}))
        return rows.add_column("reference", found.tolist()), time.perf_counter() - begun

    def loss_model(self, model: Any) -> torch.nn.Module:
        return PreferenceModel(model, self.asked.beta, self.asked.label_smoothing)

    def read(self, output: Preference) -> tuple[torch.Tensor, Sums]:
        return output.loss, {"reward_accuracy": output.right, "reward_margin": output.margin}

    def count(self, batch: Batch) -> int:
        return pair_count(batch)


def loss_of(recipe: Recipe) -> Loss:
    """The loss of the recipe's objective: over pairs, or over labelled tokens."""
    return PairLoss(recipe.own(DpoSection)) if OBJECTIVES[recipe.objective].rows == "pair" else TokenLoss()


def _reference_problem(where: str, rows: int) -> Problem:
    why = "the loss compares the model with the untrained one, so it would be NaN or Inf from the first step on"
    fix = "look at the row, check that the model's weights are finite, or set train.compute_dtype: float32"
    return Problem("TS301", f"the untrained model gives a non-finite log-probability ({rows} rows)", where, why, fix)
