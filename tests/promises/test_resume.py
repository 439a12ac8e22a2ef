"""Resume is bit-exact: every step once and the same weights, for every method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.promises.training import (
    CASES,
    STEPS,
    Promises,
    differing_bits,
    grid,
    last_savepoint_kept,
    lines,
    signalled,
    started,
    state_of,
    steps_of,
    wait_for_steps,
)
from tests.support.forked import Forked
from tunesmith.errors import RunError, StoppedError, TrainError
from tunesmith.runs import Run, read_jsonl
from tunesmith.stages.train import train

IN_SHORT = ("full, 8 bit, in backward", "lora, dropout, evaluation", "qlora, dropout, 16 bit")
FILES = ("metrics.jsonl", "evals.jsonl")


@pytest.mark.parametrize("short", [*IN_SHORT[:2], pytest.param(IN_SHORT[2], marks=pytest.mark.slow)])
def test_the_same_bits_as_without_interruption(short: str, make_run: Callable[..., Run], promises: Promises) -> None:
    """Weights, optimizer, generators and schedule three steps before the end, the weights at the end, and every metric."""
    if promises.long and short != IN_SHORT[0]:
        pytest.skip("the first one tries all")
    cases = grid() | CASES if promises.long else {short: CASES[short]}
    bits = 0
    for number, (name, case) in enumerate(cases.items()):
        whole, parts = make_run(f"whole-{number}", case), make_run(f"parts-{number}", case)
        with last_savepoint_kept(whole) as wanted:
            train(whole)
        with last_savepoint_kept(parts) as found:
            for signal_number, after in ((signal.SIGTERM, 4), (signal.SIGINT, 11)):
                with pytest.raises(StoppedError) as caught:
                    signalled(parts, signal_number, after)
                assert caught.value.exit_code == 128 + signal_number
            train(parts)
        assert steps_of(parts) == list(range(1, STEPS + 1)), name
        for file in FILES:
            assert lines(parts.path / "train" / file) == lines(whole.path / "train" / file), name
        assert state_of(found) == state_of(wanted), name
        bits += differing_bits(wanted, found)
        bits += differing_bits(*(run.path / "train" / "checkpoints" for run in (whole, parts)))
        assert bits == 0, name
        assert [event["code"] for event in parts.events("train")].count("resumed") == 2
        assert not (parts.path / "train" / "savepoints").exists()
    promises.state("resume", "count", resume_configurations=len(cases), resume_differing_bits=bits)


def stopped(run: Run, after: int = 8) -> None:
    with pytest.raises(StoppedError):
        signalled(run, signal.SIGTERM, after)


def test_a_damaged_savepoint_is_passed_over(make_run: Callable[..., Run]) -> None:
    whole, parts = (make_run(name, CASES["full, accumulation"]) for name in ("whole", "parts"))
    train(whole)
    stopped(parts)
    older, newer = sorted((parts.path / "train" / "savepoints").iterdir())
    content = bytearray((newer / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newer / "optimizer.safetensors").write_bytes(content)
    train(parts)
    codes = [(event["code"], event["message"]) for event in parts.events("train")]
    assert ("savepoint-damaged", f"{newer.name} is not used: optimizer.safetensors was changed") in codes
    assert ("resumed", f"resumed after step {int(older.name[-6:])}") in codes
    assert differing_bits(*(run.path / "train" / "checkpoints" for run in (whole, parts))) == 0
    assert lines(parts.path / "train" / "metrics.jsonl") == lines(whole.path / "train" / "metrics.jsonl")


def test_what_has_changed_is_refused_by_its_key(make_run: Callable[..., Run]) -> None:
    case = CASES["full, accumulation"]
    run = make_run("run", case)
    stopped(run)
    before = sorted((run.path / "train" / "savepoints").rglob("*"))
    with pytest.raises(TrainError) as caught:
        train(make_run("run", case, "save_steps: 3, learning_rate: 0.001"))
    (problem,) = caught.value.problems
    assert problem.code == "TS311"
    assert problem.what.endswith("; changed since then: settings.learning_rate, train.learning_rate")
    assert sorted((run.path / "train" / "savepoints").rglob("*")) == before
    assert train(make_run("run", case, "save_steps: 5"))["steps"] == STEPS  # save_steps may change
    events = run.events("train")
    assert [event["code"] for event in events].count("resumed") == 1


def test_restart_begins_again(make_run: Callable[..., Run]) -> None:
    case = CASES["full, accumulation"]
    stopped(make_run("run", case))
    run = make_run("run", case, "save_steps: 3, learning_rate: 0.001")
    train(run, restart=True)
    assert "resumed" not in [event["code"] for event in run.events("train")]
    assert len(read_jsonl(run.path / "train" / "metrics.jsonl")) == STEPS


def test_two_processes_do_not_work_on_one_run(make_run: Callable[..., Run]) -> None:
    run = make_run("run", CASES["full, accumulation"])
    code = "import sys, time; from pathlib import Path; from tunesmith.runs import open_run\n"
    code += "with open_run(Path(sys.argv[1]))._alone():\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=f"process {holder.pid} on ") as caught:
            train(run)
        holder.kill()
    assert caught.value.problems[0].code == "TS014"
    assert train(run)["steps"] == STEPS


def test_a_signal_to_run_reaches_the_training(make_run: Callable[..., Run]) -> None:
    """`tunesmith run` trains in a child process: that one finishes its step, saves, and both exit with 143."""
    prepared = make_run("run", CASES["lora, dropout, evaluation"])
    recipe = prepared.path.parent / "recipe.yaml"
    recipe.write_text((prepared.path / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with Forked("tunesmith", ["run", str(recipe), "--run", str(prepared.path)]) as process:
        wait_for_steps(prepared, process, 5)
        process.terminate()
        error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM after step" in error
    assert list((prepared.path / "train" / "savepoints").glob("step-*"))
    assert prepared.was_interrupted("train")


def test_a_second_signal_leaves_at_once(make_run: Callable[..., Run]) -> None:
    run = make_run("run", CASES["full, accumulation"], "save_steps: null", steps=400)
    with started(run) as process:
        wait_for_steps(run, process, 3)
        for number in (signal.SIGTERM, signal.SIGINT):  # within a step
            os.kill(process.pid, number)
        process.communicate()
    assert process.returncode in {-signal.SIGINT, -signal.SIGTERM}  # whichever signal was seen second
    assert not (run.path / "train" / "savepoints").exists()  # it did not wait for the step to be saved
