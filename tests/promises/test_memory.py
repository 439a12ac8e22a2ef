"""Out of memory: the longest rows are tried first, a step is split into smaller parts, a row that does not fit is reported."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row, random_llama
from tests.promises.training import Promises, started
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare

STEPS = 2
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None,
    reason="the allocator with a limit is built with cc, for glibc",
)


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allocator with a limit, for LD_PRELOAD."""
    source, built = Path(__file__).with_name("allocator.c"), tmp_path_factory.mktemp("allocator") / "allocator.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)  # noqa: S607 - whichever is there
    return built


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama whose activations dominate its memory."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    return random_llama(folder, tokenizer, hidden_size=96, intermediate_size=512, num_hidden_layers=6)


@pytest.fixture
def make_run(tmp_path: Path, deep_model: Path, write_rows: Any) -> Callable[..., Run]:
    """Rows of 25 to 250 tokens, 16 per micro-batch if memory allows it."""
    draw = random.Random(42)
    numbers = [" ".join(str(draw.randint(0, 9)) for _ in range(number % 8 * 8 + 5)) for number in range(64)]
    write_rows([chat_row(f"Repeat {each}", each) for each in numbers])

    def make(name: str, more: str = "effective_batch_size: 16, per_device_train_batch_size: 16", method: str = "full") -> Run:
        text = f"model: {deep_model}\nmethod: {method}\n"
        text += "data: {train: train.jsonl, heldout: 0, duplicates: {threshold: null}}\n"
        text += f"train: {{max_steps: {STEPS}, compute_dtype: float32, {more}}}\n"
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / name)
        assert prepare(run)["rows_train"] == 64
        return run

    return make


@pytest.fixture
def finished(allocator: Path) -> Callable[[Run, str], tuple[int, str, str]]:
    """Exit code, output and error of a training run that may take `limit` bytes more than at its start."""

    def run_it(run: Run, limit: str) -> tuple[int, str, str]:
        with started(run, "limited", limit, LD_PRELOAD=str(allocator)) as process:
            out, error = process.communicate()
        return process.returncode, out, " ".join(error.split())[-1500:]

    return run_it


def test_a_step_that_does_not_fit_is_computed_in_parts(make_run: Any, finished: Any, promises: Promises) -> None:
    methods = ("full", "lora", "qlora") if promises.long else ("lora",)
    worst = 0.0
    for method in methods:
        free, tight = (make_run(f"{name}-{method}", method=method) for name in ("free", "tight"))
        code, out, error = finished(free, "count")
        assert code == 0, error
        code, _, error = finished(tight, str(int(out.split("grew ")[1].split()[0]) * 6 // 10))
        assert code == 0, error
        found = [event["message"] for event in tight.events("train") if event["code"] == "out-of-memory"]
        assert found
        assert "with the same rows per step" in found[0]
        assert not [event for event in free.events("train") if event["code"] == "out-of-memory"]
        both = [read_jsonl(run.path / "train" / "metrics.jsonl") for run in (free, tight)]
        assert [step["labelled_tokens"] for step in both[0]] == [step["labelled_tokens"] for step in both[1]]
        worst = max(worst, *(abs(one["loss"] - other["loss"]) for one, other in zip(*both, strict=True)))
        assert worst < 1e-6 * max(step["loss"] for step in both[0]), method
    promises.state("out of memory", "nats", oom_loss_max_abs_diff=worst)


def test_a_row_that_does_not_fit_alone_is_told_before_any_step(make_run: Any, finished: Any) -> None:
    run = make_run("run", method="lora")
    code, _, error = finished(run, str(4 << 20))
    assert code == 2, error
    assert "TS312" in error
    assert "out of memory with one row of" in error
    assert "gradient_checkpointing: true (keeps " in error
    assert read_jsonl(run.path / "train" / "metrics.jsonl") == []


def test_weights_that_move_in_the_backward_pass_do_not_begin_a_step_that_does_not_fit(make_run: Any, finished: Any) -> None:
    run = make_run("run", "optimizer_in_backward: true, per_device_train_batch_size: 16")
    code, _, error = finished(run, str(60 << 20))
    assert code == 2, error
    assert "lower train.per_device_train_batch_size" in error
    assert read_jsonl(run.path / "train" / "metrics.jsonl") == []
