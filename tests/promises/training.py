"""Training that is interrupted from outside, and bitwise comparison of the results."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import claim, merged, report

from tests.support.forked import Forked
from tunesmith.runs import Run, read_jsonl
from tunesmith.stages.train import train

Process = subprocess.Popen[str] | Forked

STEPS = 36
LAST_SAVED = 33  # with `save_steps: 3`

#: Method and settings by name, each an unclosed YAML flow mapping.
CASES = {
    "full, accumulation": "method: full\ntrain: {per_device_train_batch_size: 2, ",
    "full, 8 bit, in backward": "method: full\ntrain: {optim: adamw_8bit, optimizer_in_backward: true, ",
    "full, kahan, bf16": "method: full\ntrain: {optim: adamw_kahan, compute_dtype: bfloat16, ",
    "lora, dropout, evaluation": "method: lora\nlora: {lora_dropout: 0.2}\ntrain: {eval_steps: 5, ",
    "lora, padded, noise": "method: lora\ntrain: {packing: false, neftune_noise_alpha: 5, ",
    "qlora, dropout, 16 bit": "method: qlora\nlora: {lora_dropout: 0.1}\ntrain: {optim: adamw_kahan, ",
}


def grid() -> dict[str, str]:
    """full, LoRA, QLoRA x dropout (full: noise on the embeddings) x accumulation x packing: 24 configurations."""
    found = {}
    for method, noisy, rows, packed in product(("full", "lora", "qlora"), (False, True), (8, 2), (True, False)):
        keys = f"per_device_train_batch_size: {rows}, packing: {str(packed).lower()}, "
        keys += "neftune_noise_alpha: 5, " if noisy and method == "full" else ""
        section = "lora: {lora_dropout: 0.2}\n" if noisy and method != "full" else ""
        name = f"{method}{', dropout' if noisy else ''}, {8 // rows} micro-batches, {'tree' if packed else 'padded'}"
        found[name] = f"method: {method}\n{section}train: {{{keys}"
    return found


class Promises:
    """The figures that the long versions of the tests state; the short versions' figures are dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.claims: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    @property
    def long(self) -> bool:
        """Whether figures are requested."""
        return self.path is not None

    def state(self, part: str, unit: str, **values: float) -> None:
        """Record a part's figures, by the names of their claims."""
        if self.long:
            self.claims += [claim(name, value, unit) for name, value in values.items()]
            self.rows.append({"part": part, **values})

    def write(self) -> None:
        """Write the figures to the file, and keep those of parts that did not run."""
        if self.path is not None and self.claims:
            report(self.path, *merged(self.path, self.claims, self.rows))


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file without durations."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(path)]


def state_of(savepoint: Path) -> str:
    """A savepoint's state other than tensors, without the durations of evaluations."""
    return re.sub(r'"seconds": [0-9.e-]+', "", (savepoint / "state.json").read_text(encoding="utf-8"))


def steps_of(run: Run) -> list[int]:
    """The steps in metrics.jsonl, in file order."""
    return [line["step"] for line in read_jsonl(run.path / "train" / "metrics.jsonl")]


def differing_bits(one: Path, other: Path) -> int:
    """Bits in which the safetensors files of two folders differ; a missing tensor counts with all its bits."""
    sides = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in (one, other)]
    if not sides[0]:
        raise AssertionError(f"no tensors in {one}")
    found = 0
    for name in sides[0].keys() | sides[1].keys():
        left, right = (np.frombuffer(side.get(name, b""), dtype=np.uint8) for side in sides)
        if len(left) == len(right):
            found += int(np.unpackbits(left ^ right).sum())
        else:
            found += 8 * max(len(left), len(right))
    return found


def same(one: Run, other: Run) -> None:
    """Assert that both runs have bit-identical results, with each step once."""
    assert steps_of(other) == list(range(1, len(steps_of(one)) + 1))
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert lines(other.path / "train" / name) == lines(one.path / "train" / name)
    assert differing_bits(*(run.path / "train" / "checkpoints" for run in (one, other))) == 0


@contextmanager
def once(seen: Callable[[], bool], then: Callable[[], object]) -> Iterator[None]:
    """Within the block, a thread polls `seen` every two milliseconds and calls `then` the first time that it is true."""

    def watch() -> None:
        while not ended.wait(0.002):
            if seen():
                then()
                return

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def steps_written(run: Run) -> int:
    """Number of complete lines in metrics.jsonl."""
    path = run.path / "train" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@contextmanager
def last_savepoint_kept(run: Run) -> Iterator[Path]:
    """Within the block, copy the savepoint of step `LAST_SAVED` as soon as it exists: it is removed when training ends."""
    source, kept = run.path / "train" / "savepoints" / f"step-{LAST_SAVED:06d}", run.path.parent / f"{run.path.name}-kept"
    with once(source.is_dir, lambda: shutil.copytree(source, kept, copy_function=os.link)):
        yield kept


def signalled(run: Run, number: signal.Signals, after: int) -> None:
    """Train, and send this process the signal once metrics.jsonl has `after` steps."""
    with once(lambda: steps_written(run) >= after, lambda: os.kill(os.getpid(), number)):
        train(run)


def started(run: Run, *under: str, **environment: str) -> Forked:
    """`tunesmith train` of a run in a separate process, under a module of this folder if one is named."""
    module = f"tests.promises.{under[0]}" if under else "tunesmith"
    return Forked(module, [*under[1:], *(["--"] if under else []), "train", str(run.path)], **environment)


def wait_for_steps(run: Run, process: Process, more: int) -> None:
    """Wait until metrics.jsonl has `more` more steps than now, or the process has ended."""
    wanted = steps_written(run) + more
    while process.poll() is None and steps_written(run) < wanted:
        time.sleep(0.002)
