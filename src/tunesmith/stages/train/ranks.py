"""Several processes, started by torchrun, that train one run together: the first one writes, all agree on what is done.

The others write into a temporary folder. An optimizer step has the rows of a single process, dealt out round-robin.
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

#: What training writes into its folder.
FILES = (
    *("settings.json", "metrics.jsonl", "events.jsonl", "evals.jsonl", "summary.json", "reference.safetensors"),
    *("heldout", "checkpoints", "savepoints", "incidents"),
)


@dataclass(frozen=True)
class Ranks:
    """A process's rank among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def agreed(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.world == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in rank order, in all processes."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The part of a step's rows that this process computes; may be empty if there are fewer rows than processes."""
        return rows if self.world == 1 else rows[self.rank :: self.world]


def join(recipe: Recipe, *, cpu: bool) -> Ranks:
    """The processes that torchrun started, or this one alone. Raises RecipeError for what needs a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    problems = []
    why = "the processes would not train one model"
    if not OBJECTIVES[recipe.objective].on_engine:
        what = f"objective: {recipe.objective} in several processes"
        problems.append(Problem("TS009", what, "objective", why, "start one process: its loop is not the engine's"))
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
    """The folder that this process writes into: the run's, or a temporary one."""
    if ranks.first:
        with run.perform("train", "train", inputs, live=FILES, keep=keep) as folder:
            ranks.agreed(None)  # the folder exists
            yield folder
    else:
        ranks.agreed(None)
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    ranks.agreed(None)  # and the stage is recorded
