"""Several processes that train one run together, as torchrun starts them: the first one writes, all agree on what is done.

The others fill a folder that is thrown away. Rows of an optimizer step are those of a single process, dealt out in turn.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem, RecipeError
from tunesmith.recipe import OBJECTIVES, Recipe
from tunesmith.runs import Run

#: What a training writes into its folder.
FILES = (
    *("settings.json", "metrics.jsonl", "events.jsonl", "evals.jsonl", "summary.json", "reference.safetensors"),
    *("heldout", "checkpoints", "savepoints", "incidents"),
)


@dataclass(frozen=True)
class Ranks:
    """Where a process stands among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def agreed(self, value: Any) -> Any:
        """The first process's value, in all."""
        if self.world == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in order, in all."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The part of a step's rows that this process computes; none where there are fewer rows than processes."""
        return rows if self.world == 1 else rows[self.rank :: self.world]


def join(recipe: Recipe, *, cpu: bool) -> Ranks:
    """The processes that torchrun has started, or this one alone. Raises RecipeError for what several cannot do."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    problems = []
    why = "the processes would not train one model"
    if not OBJECTIVES[recipe.objective].on_engine:
        what = f"objective: {recipe.objective} in several processes"
        problems.append(Problem("TS009", what, "objective", why, "start it in one: its loop is not the engine's"))
    if recipe.train.optimizer_in_backward:
        what = "optimizer_in_backward in several processes: weights would move before gradients are summed"
        problems.append(Problem("TS009", what, "train.optimizer_in_backward", why, "set it to false, or start one process"))
    if problems:
        raise RecipeError(problems)
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    return Ranks(state.process_index, state.num_processes)


@contextmanager
def folder_of(ranks: Ranks, run: Run, inputs: Mapping[str, str], *, keep: bool) -> Iterator[Path]:
    """The folder that this process fills: the run's, or one that is thrown away."""
    if ranks.first:
        with run.perform("train", "train", inputs, live=FILES, keep=keep) as folder:
            ranks.agreed(None)  # it is there
            yield folder
    else:
        ranks.agreed(None)
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    ranks.agreed(None)  # and is recorded
