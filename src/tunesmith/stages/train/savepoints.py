"""What an interrupted training resumes from: all state between two steps, in safetensors and JSON, verified before use.

A savepoint is a folder `step-000200` with the current trained weights, the optimizer state, the state of every random
generator, the learning rate schedule, `Trainer`'s own state and what the caller adds. It is committed with a manifest of each
file's sha256 and size. The manifest has exactly one valid form: a savepoint with any other byte or file is invalid.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import changes, commit_folder, read_json, remove_folder, write_json

_KIND = "savepoint"
_SUFFIXES = (".safetensors", ".json")  # of its files
_STATE = "state.json"
_MARGIN = 64 << 20  # bytes to leave free on top of a savepoint
KEPT = 2  # savepoints: if the newest is damaged there is one before it


@dataclass(frozen=True)
class Savepoint:
    """A savepoint whose files are unchanged since they were written."""

    path: Path
    state: Mapping[str, Any]  # what `write` was given

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one of its files."""
        found: dict[str, torch.Tensor] = load_file(self.path / f"{name}.safetensors")
        return found


class Savepoints:
    """The folder of a training's savepoints; it keeps the last `KEPT`, and the last at multiples of `every` steps.

    `tell` reports damaged ones.
    """

    def __init__(self, folder: Path, tell: Callable[[str, str], None], every: int = 1) -> None:
        self.folder, self.tell, self.every = folder, tell, every

    def write(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, str], state: Any) -> Path:
        """Commit the tensors (one file per key), texts (name to content) and `state`, which has a `step`.

        Raises TrainError if the disk has no room for it or fails to write it; earlier savepoints stay unchanged.
        """
        needed = sum(each.numel() * each.element_size() for group in tensors.values() for each in group.values())
        path = self.folder / f"step-{state['step']:06d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed + _MARGIN:
            raise _no_room(path, needed, free)
        if path.is_dir() and damage_of(path) is not None:
            remove_folder(path, _SUFFIXES)
        try:
            with commit_folder(path, _KIND) as target:
                for name, group in tensors.items():
                    save_file({key: each.detach().contiguous() for key, each in group.items()}, target / f"{name}.safetensors")
                for name, text in documents.items():
                    (target / name).write_text(text, encoding="utf-8")
                write_json(target / _STATE, state)
        except Exception as error:
            if isinstance(error, OSError) or "I/O error" in str(error):  # safetensors has an error of its own
                raise _no_room(path, needed, shutil.disk_usage(self.folder).free, str(error)) from error
            raise
        saved = self._all()
        kept = {*saved[-KEPT:], *[each for each in saved if _step_of(each) % self.every == 0][-KEPT:]}
        for old in saved:
            if old not in kept:
                remove_folder(old, _SUFFIXES)
        return path

    def newest(self, every: int = 1) -> Savepoint | None:
        """The newest intact savepoint at a multiple of `every` steps; an event for each newer one that is damaged.

        None if there is none.
        """
        for path in reversed(self._all()):
            if _step_of(path) % every:
                continue
            if (damage := damage_of(path)) is None:
                return Savepoint(path, read_json(path / _STATE))
            self.tell("savepoint-damaged", f"{path.name} is not used: {damage}")
        return None

    def clear(self) -> None:
        """Remove all savepoints: the training has ended."""
        for path in self._all():
            remove_folder(path, _SUFFIXES)
        with contextlib.suppress(OSError):  # there is none, or something else is in it
            self.folder.rmdir()

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage_of(path: Path) -> str | None:
    """What is wrong with a savepoint's files; None if all are as they were written."""
    return next(iter(changes(path, _KIND)), None)


def _no_room(path: Path, needed: int, free: int, detail: str = "") -> TrainError:
    what = f"no room for a savepoint: {needed:,} bytes are needed, {free:,} are free{detail and f' ({detail})'}"
    why = "the training could not resume from here after an interruption; the previous savepoint is unchanged"
    fix = "free some space and run `train` again: it resumes from the previous savepoint"
    return TrainError(Problem("TS310", what, str(path), why, fix))


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of Python's, NumPy's and torch's generators: tensors, and the rest as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    tensors |= {f"cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    more = {"python": [version, gauss], "numpy": [str(kind), int(position), int(has_gauss), float(cached)]}
    return tensors, more


def set_random_state(tensors: Mapping[str, torch.Tensor], more: Mapping[str, Any]) -> None:
    """Restore the generators to the state from `random_state`."""
    version, gauss = more["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = more["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for number in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(tensors[f"cuda.{number}"], number)
