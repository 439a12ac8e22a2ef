"""SIGKILL at any moment, and a disk that is full at any file: the next start resumes, and nothing is lost or repeated."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.promises.training import CASES, STEPS, Promises, same, started, steps_of, wait_for_steps
from tunesmith.runs import Run
from tunesmith.stages.train import train
from tunesmith.stages.train.savepoints import damage_of

CASE = CASES["lora, dropout, evaluation"]
WRITES = {"write", "serialize_file"}  # calls that fail on a full disk


def with_savepoints(run: Run) -> None:
    """Stop the run after a few steps, so the next save also removes an old savepoint."""
    with started(run) as process:
        wait_for_steps(run, process, 3)
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


def calls_of_a_save(make_run: Callable[..., Run]) -> list[str]:
    """The names of the file calls of a save that also removes an old savepoint."""
    with started(make_run("counted", CASE, "save_steps: 1"), "killer", "count", "0") as process:
        out = process.communicate()[0]
    assert process.returncode == 0
    calls = next(line for line in out.splitlines() if line.startswith("calls ")).split()[1:]
    assert "rename" in calls
    assert "rmdir" in calls
    return calls


@pytest.mark.slow
def test_sigkill_at_random_moments(make_run: Callable[..., Run], promises: Promises) -> None:
    """One training run, killed repeatedly: while it starts, in a step, in a save."""
    moments = 20 if promises.long else 2
    steps = 3 * moments + STEPS
    whole, parts = (make_run(name, CASE, "save_steps: 2", steps) for name in ("whole", "parts"))
    train(whole)
    draw = random.Random(42)
    killed = 0
    for moment in range(moments):
        with started(parts) as process:
            if moment % 5 == 4:
                time.sleep(draw.uniform(0.0, 6.0))
            else:
                wait_for_steps(parts, process, draw.randint(1, 3))
                time.sleep(draw.uniform(0.0, 0.1))
            process.kill()
        killed += process.returncode == -signal.SIGKILL
    assert killed == moments
    train(parts)
    same(whole, parts)
    promises.state("sigkill at random moments", "count", sigkill_moments=moments, sigkill_survived=killed)


def test_sigkill_at_every_file_call_of_a_save(make_run: Callable[..., Run], promises: Promises) -> None:
    which = ["rename", "rmdir"]
    if promises.long:
        which = [str(number + 1) for number in range(len(calls_of_a_save(make_run)))]
    whole, parts = (make_run(name, CASE, "save_steps: 1", len(which) + STEPS) for name in ("whole", "parts"))
    train(whole)
    with_savepoints(parts)
    for call in which:
        with started(parts, "killer", "kill", call) as process:
            process.communicate()
        assert process.returncode == -signal.SIGKILL, call
    train(parts)
    same(whole, parts)
    lost = len(set(steps_of(whole)) ^ set(steps_of(parts))) + len(steps_of(parts)) - len(set(steps_of(parts)))
    promises.state("sigkill at file calls", "count", sigkill_file_calls=len(which), steps_lost_or_repeated=lost)


def test_a_disk_that_is_full_at_any_file_of_a_save(make_run: Callable[..., Run], promises: Promises) -> None:
    which = ["serialize_file", "write"]
    if promises.long:
        which = [str(number) for number, name in enumerate(calls_of_a_save(make_run), start=1) if name in WRITES]
    whole, parts = (make_run(name, CASE, "save_steps: 1", STEPS) for name in ("whole", "parts"))
    train(whole)
    with_savepoints(parts)
    folder = parts.path / "train" / "savepoints"
    survived = 0
    for call in which:
        before = sorted(folder.iterdir())
        with started(parts, "killer", "full", call) as process:
            error = process.communicate()[1]
        assert process.returncode == 2, error
        assert "TS310" in error
        assert " bytes are needed, " in error
        assert sorted(folder.iterdir()) == before
        assert before
        survived += all(damage_of(path) is None for path in before)
    assert survived == len(which)
    train(parts)
    same(whole, parts)
    promises.state("full disk", "count", disk_full_moments=len(which), disk_full_survived=survived)
