"""An interrupted training goes on to the same bits: every step once, the same weights, whatever the method."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tunesmith.errors import StageFailedError
from tunesmith.io.atomic import sha256_file
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

STEPS = 24
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
