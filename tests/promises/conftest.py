"""Shared by the tests of promises: small runs to interrupt, and the file for the long versions' figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tests.promises.training import STEPS, Promises
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run
from tunesmith.stages.prepare import prepare


@pytest.fixture(scope="session")
def promises(request: pytest.FixtureRequest) -> Iterator[Promises]:
    """Figures by name; `long` if they are requested. A test states them after all its checks have passed."""
    path = request.config.getoption("--promises")
    found = Promises(None if path is None else Path(path))
    yield found
    found.write()


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, write_rows: Any) -> Callable[..., Run]:
    """A prepared run by name, with one of the methods' settings and further keys of the train section."""
    write_rows([chat_row(f"Say {number} and {number * 7 % 11}", f"so it is {number}") for number in range(45)])

    def make(name: str, case: str, more: str = "save_steps: 3", steps: int = STEPS) -> Run:
        text = f"model: {tiny_model}\ndata: {{train: train.jsonl, heldout: 0.1}}\n"
        text += f"{case}effective_batch_size: 8, max_steps: {steps}, {more}}}\n"
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / name)
        prepare(run)
        return run

    return make
