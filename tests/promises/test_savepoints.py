"""Savepoints: they read back what was written, detect any damage to the files, and survive a full disk."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tests.promises.training import Promises
from tunesmith.stages.train.savepoints import KEPT, Savepoints, damage_of, random_state, set_random_state

TENSORS = {"weights": {"a": torch.arange(300.0)}, "optimizer": {"a.step": torch.tensor([3]), "a.master": torch.ones(7)}}


def written(folder: Path, step: int = 3) -> Path:
    return Savepoints(folder, lambda *_: None).write(TENSORS, {"trainer_state.json": "{}\n"}, {"step": step, "more": [1.5]})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    for step in range(1, 5):
        written(tmp_path, step)
    assert len(list(tmp_path.iterdir())) == KEPT
    saved = Savepoints(tmp_path, lambda *event: told.append(event)).newest()
    assert saved is not None
    assert (saved.step, saved.state["more"], told) == (4, [1.5], [])
    for name, group in TENSORS.items():
        found = saved.tensors(name)
        assert found.keys() == group.keys()
        assert all(torch.equal(found[key], group[key]) for key in group)


def test_every_kind_of_damage_is_found(tmp_path: Path, promises: Promises) -> None:
    """Bit flips, cuts, additions and deletions in the newest of two: each is found and reported, and the older one is used."""
    older, newer = (written(tmp_path / "whole", step) for step in (3, 4))
    draw = random.Random(42)
    times = 300 if promises.long else 40
    caught = clean = false_alarms = 0
    for attempt in range(times):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        told: list[tuple[str, str]] = []
        savepoints = Savepoints(folder, lambda *event, told=told: told.append(event))
        found = savepoints.newest()
        assert found is not None
        clean += found.path.name == newer.name
        false_alarms += len(told)
        path = folder / newer.name
        file = draw.choice(sorted(path.iterdir()))
        content = bytearray(file.read_bytes())
        kind = attempt % 4
        if kind == 0:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[draw.randrange(len(content)) :]
        elif kind == 2:
            content += b"\n"
        file.write_bytes(content)
        if kind == 3:
            file.unlink()
        found = savepoints.newest()
        assert found is not None
        assert found.path.name == older.name, (kind, file.name)
        caught += [code for code, _ in told] == ["savepoint-damaged"]
    assert (caught, clean, false_alarms) == (times, times, 0)
    (newer / "more.pkl").write_bytes(b"")
    assert damage_of(newer) == "more.pkl does not belong to it"
    figures = {"corruptions_found": caught, "clean_loads": clean, "false_alarms": false_alarms}
    promises.state("corruption", "count", corruptions_tried=times, **figures)


def test_a_disk_that_is_full_leaves_the_savepoint_before(tmp_path: Path) -> None:
    """No file may grow beyond 600 bytes, as on a full disk; in a separate process, since the limit applies to all its files."""
    before = written(tmp_path)
    code = """
import resource, signal, sys
from pathlib import Path
import torch
from tunesmith.errors import TrainError
from tunesmith.stages.train.savepoints import Savepoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    Savepoints(Path(sys.argv[1]), print).write({"weights": {"a": torch.arange(300.0)}}, {}, {"step": 4})
except TrainError as error:
    print(error.problems[0].code, error.problems[0].what)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("TS310 no room for a savepoint: 1,200 bytes are needed")
    assert list(tmp_path.iterdir()) == [before]
    assert damage_of(before) is None


def test_generators_go_on_where_they_were() -> None:
    tensors, more = random_state()
    drawn = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist())
    set_random_state(tensors, more)
    assert (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()) == drawn
