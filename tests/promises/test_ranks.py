"""Two processes (gloo) that train one run: the same losses as one process, and every step once even if they are killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.promises.training import CASES, STEPS, Promises, lines, same, steps_of, wait_for_steps
from tests.support.forked import Forked
from tunesmith.errors import RecipeError
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, read_jsonl
from tunesmith.stages.train import train
from tunesmith.stages.train.ranks import join

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def forked(run: Run) -> Iterator[list[Forked]]:
    """`tunesmith train` in two processes with the environment that torchrun gives them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        begin = (Forked("tunesmith", ["train", str(run.path)], RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01")
        yield [stack.enter_context(each) for each in begin]


def launched(run: Run) -> subprocess.Popen[str]:
    """`torchrun -m tunesmith train` with two processes, in their own process group."""
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.Popen(
        [*launcher, "-m", "tunesmith", "train", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finished(run: Run) -> None:
    with forked(run) as processes:
        for process in processes:
            error = process.communicate()[1]
            assert process.returncode == 0, error[-3000:]


def test_two_processes_train_what_one_does(make_run: Callable[..., Run], promises: Promises) -> None:
    """The same rows in each step, so the same losses up to rounding; dropout draws different numbers in each process."""
    names = ("full, accumulation", "lora, dropout, evaluation") if promises.long else ("lora, dropout, evaluation",)
    for name in names:
        text = CASES[name].replace("lora: {lora_dropout: 0.2}\n", "")
        more = "save_steps: 3, compute_dtype: float32"
        one, both = (make_run(f"{side} {name.partition(',')[0]}", text, more, 14) for side in ("one", "both"))
        train(one)
        finished(both)
        for left, right in zip(*(lines(run.path / "train" / "metrics.jsonl") for run in (one, both)), strict=True):
            assert all(left[key] == right[key] for key in ("step", "tokens", "labelled_tokens"))
            assert abs(left["loss"] - right["loss"]) < 1e-5
            assert abs(left["grad_norm"] - right["grad_norm"]) < 1e-4 * left["grad_norm"]
        looks = [[line["step"] for line in read_jsonl(run.path / "train" / "evals.jsonl")] for run in (one, both)]
        assert looks[0] == looks[1]


def test_two_processes_are_killed_and_go_on(make_run: Callable[..., Run], promises: Promises) -> None:
    moments = 5 if promises.long else 1
    steps = STEPS + 3 * moments
    whole, parts = (make_run(name, CASES["lora, dropout, evaluation"], "save_steps: 2", steps) for name in ("whole", "parts"))
    finished(whole)
    draw = random.Random(42)
    killed = 0
    for _ in range(moments):
        with forked(parts) as processes:
            wait_for_steps(parts, processes[0], draw.randint(2, 4))
            time.sleep(draw.uniform(0.0, 0.1))
            for process in processes:
                process.kill()
        killed += all(process.returncode == -signal.SIGKILL for process in processes)
    assert killed == moments
    finished(parts)
    assert steps_of(parts) == list(range(1, steps + 1))
    same(whole, parts)
    assert any(event["code"] == "resumed" for event in parts.events("train"))
    promises.state("two processes", "count", two_process_moments=moments, two_process_survived=killed)


@pytest.mark.slow
def test_torchrun_starts_them_and_they_resume_after_a_kill(make_run: Callable[..., Run]) -> None:
    steps = STEPS + 3
    whole, parts = (make_run(name, CASES["lora, dropout, evaluation"], "save_steps: 2", steps) for name in ("whole", "parts"))
    finished(whole)
    with launched(parts) as process:
        wait_for_steps(parts, process, 3)
        os.killpg(process.pid, signal.SIGKILL)
    with launched(parts) as process:
        error = process.communicate()[1]
    assert process.returncode == 0, error[-3000:]
    same(whole, parts)
    assert any(event["code"] == "resumed" for event in parts.events("train"))


def test_what_several_processes_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = "model: m\nobjective: kto\ndata: {train: t}"
    with pytest.raises(RecipeError, match="objective: kto in several processes"):
        join(parse_recipe(text, "r", Path()).recipe, cpu=True)
    text = "model: m\ndata: {train: t}\ntrain: {optimizer_in_backward: true}"
    with pytest.raises(RecipeError, match="weights would move before gradients are summed"):
        join(parse_recipe(text, "r", Path()).recipe, cpu=True)
