"""An interrupted training goes on to the same bits: every step once, the same weights, whatever the method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tunesmith.errors import RunError, StageFailedError, TrainError
from tunesmith.io.atomic import sha256_file
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

STEPS = 36
CASES = {
    "full, accumulation": "method: full\ntrain: {per_device_train_batch_size: 2, ",
    "full, 8 bit, in backward": "method: full\ntrain: {optim: adamw_8bit, optimizer_in_backward: true, ",
    "full, kahan, bf16": "method: full\ntrain: {optim: adamw_kahan, compute_dtype: bfloat16, ",
    "lora, dropout, evaluation": "method: lora\nlora: {lora_dropout: 0.2}\ntrain: {eval_steps: 5, ",
    "lora, padded, noise": "method: lora\ntrain: {packing: false, neftune_noise_alpha: 5, ",
    "qlora, dropout, 16 bit": "method: qlora\nlora: {lora_dropout: 0.1}\ntrain: {optim: adamw_bf16, ",
}


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, write_rows: Any) -> Callable[..., Run]:
    write_rows([chat_row(f"Say {number} and {number * 7 % 11}", f"so it is {number}") for number in range(45)])

    def make(name: str, case: str, more: str = "save_steps: 3") -> Run:
        text = f"model: {tiny_model}\ndata: {{train: train.jsonl, heldout: 0.1}}\n"
        text += f"{case}effective_batch_size: 8, max_steps: {STEPS}, {more}}}\n"
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / name)
        prepare(run)
        return run

    return make


def lines(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(path)]


def what_was_trained(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {name: lines(run.path / "train" / name) for name in ("metrics.jsonl", "evals.jsonl")}
    weights = (run.path / "train" / "checkpoints").rglob("*.safetensors")
    return found | {path.relative_to(run.path).as_posix(): sha256_file(path) for path in weights}


def signalled(run: Run, number: signal.Signals, after: int) -> None:
    """Train; once so many steps stand in metrics.jsonl, this process gets the signal."""
    path = run.path / "train" / "metrics.jsonl"

    def watch() -> None:
        while not ended.wait(0.002):
            if path.is_file() and path.read_bytes().count(b"\n") >= after:
                os.kill(os.getpid(), number)
                return

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(run)
    finally:
        ended.set()
        watcher.join()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_bits_as_without_interruption(make_run: Callable[..., Run], case: str) -> None:
    whole, parts = make_run("whole", case), make_run("parts", case)
    train(whole)
    for number, after in ((signal.SIGTERM, 4), (signal.SIGINT, 11)):
        with pytest.raises(StageFailedError) as caught:
            signalled(parts, number, after)
        assert caught.value.exit_code == 128 + number
    train(parts)
    assert [line["step"] for line in read_jsonl(parts.path / "train" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert what_was_trained(parts) == what_was_trained(whole)
    assert [event["code"] for event in parts.events("train")].count("resumed") == 2
    assert not (parts.path / "train" / "savepoints").exists()


def stopped(run: Run, after: int = 8) -> None:
    with pytest.raises(StageFailedError):
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
    assert ("savepoint-damaged", f"{newer.name} is not used: optimizer.safetensors is changed") in codes
    assert ("resumed", f"goes on after step {int(older.name[-6:])}") in codes
    assert what_was_trained(parts) == what_was_trained(whole)


def test_what_has_changed_is_refused_by_its_key(make_run: Callable[..., Run]) -> None:
    case = CASES["full, accumulation"]
    run = make_run("run", case)
    stopped(run)
    before = sorted((run.path / "train" / "savepoints").rglob("*"))
    with pytest.raises(TrainError) as caught:
        train(make_run("run", case, "save_steps: 3, learning_rate: 0.001"))
    (problem,) = caught.value.problems
    assert problem.code == "TS311"
    assert problem.what.endswith("has changed: settings.learning_rate, train.learning_rate")
    assert sorted((run.path / "train" / "savepoints").rglob("*")) == before
    assert train(make_run("run", case, "save_steps: 5"))["steps"] == STEPS  # how often it is saved may change
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


def test_a_killed_training_goes_on_by_the_command_line(make_run: Callable[..., Run]) -> None:
    whole, parts = (make_run(name, CASES["lora, dropout, evaluation"]) for name in ("whole", "parts"))
    train(whole)
    for after in (4, 13):
        command = [sys.executable, "-m", "tunesmith", "train", str(parts.path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
            path = parts.path / "train" / "metrics.jsonl"
            while killed.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < after):
                time.sleep(0.002)
            killed.kill()
        assert killed.returncode == -signal.SIGKILL
    train(parts)
    assert [line["step"] for line in read_jsonl(parts.path / "train" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert what_was_trained(parts) == what_was_trained(whole)
