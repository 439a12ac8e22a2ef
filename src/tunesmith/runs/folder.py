"""The run folder: the only state that stages share.

For each stage, `run.json` holds the digests of its inputs and of its part of the recipe, and its outputs. A stage whose
digests are unchanged and whose files still exist is a no-op. No state of a run is kept only in memory.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith.errors import Problem, RecipeError, RunError
from tunesmith.io.atomic import (
    append_jsonl,
    commit_folder,
    committed_files,
    empty_folder,
    sha256_bytes,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from tunesmith.recipe import Recipe, ResolvedRecipe, decided, dump_recipe, parse_recipe

EVAL_SUITE = "task"

_PACKAGES = ("tunesmith", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's numbers, without importing them."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    path: Path
    recipe: Recipe

    def status(self) -> dict[str, Any]:
        """The content of run.json."""
        value: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        return value

    def outputs_digest(self, stage: str) -> str:
        """A digest of a finished stage's outputs, for the stages that read them.

        Raises RunError if the stage has not run, or if it ran with a different recipe or data than the run has now.
        """
        entry = self.status()["stages"].get(stage)
        if entry is None or entry["status"] != "done":
            fix = f"run `tunesmith {stage.partition('/')[0]} {self.path}` first"
            why = "a later stage reads its outputs"
            raise RunError(Problem("TS011", f"stage {stage!r} has not been run", str(self.path), why, fix))
        if (reason := self.outdated(stage)) is not None:
            command = f"prepare {self.path / 'recipe.yaml'} --run" if stage == "prepare" else stage.partition("/")[0]
            fix = f"run `tunesmith {command} {self.path}` again, or revert the change"
            why = "later stages would use outputs of one recipe and report another"
            raise RunError(Problem("TS012", f"stage {stage!r} is out of date: {reason}", str(self.path), why, fix))
        return sha256_json(entry["outputs"])

    def outdated(self, stage: str) -> str | None:
        """Why a stage's outputs are out of date; None if they are current, as far as the recipe and the stages show."""
        stages = self.status()["stages"]
        inputs = stages[stage]["inputs"]
        if "recipe" in inputs and _knows(stage) and inputs["recipe"] != self.recipe.stage_digest(stage):
            return f"the recipe has changed since {stage!r}"
        for name, before in (("data", "prepare"), ("train", "train"), ("plan", "plan")):
            if (
                stage == "prepare" or name not in inputs or before not in stages
            ):  # prepare's inputs are files, which may have these names
                continue
            if inputs[name] != sha256_json(stages[before]["outputs"]):
                return f"the outputs of {before!r} have changed since {stage!r}"
            if (reason := self.outdated(before)) is not None:
                return reason
        return None

    def is_current(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether the stage is done with exactly these inputs and all its output files are unchanged."""
        entry = self.status()["stages"].get(stage)
        if entry is None or entry["status"] != "done" or entry["inputs"] != dict(inputs):
            return False
        return all(
            (self.path / name).is_file() and sha256_file(self.path / name) == digest
            for name, digest in entry["outputs"].items()
        )

    def event(self, folder: Path, code: str, message: str, **facts: Any) -> None:
        """Record in `folder`/events.jsonl that something differs from what was requested."""
        append_jsonl(folder / "events.jsonl", {"code": code, "message": message, **facts})

    def events(self, stage_folder: str) -> list[dict[str, Any]]:
        """The events that a stage recorded, oldest first."""
        return read_jsonl(self.path / stage_folder / "events.jsonl")

    def _record(self, stage: str, entry: dict[str, Any]) -> None:
        status = self.status()
        status["stages"][stage] = entry
        write_json(self.path / "run.json", status)

    def is_done(self, stage: str) -> bool:
        """Whether the stage has completed, with whatever inputs."""
        entry = self.status()["stages"].get(stage)
        return entry is not None and entry["status"] == "done"

    def was_interrupted(self, stage: str) -> bool:
        """Whether the stage was started and has not completed."""
        entry = self.status()["stages"].get(stage)
        return entry is not None and entry["status"] != "done"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the run against other processes. Raises RunError if another process holds the lock."""
        holder = self.path / ".holder.json"
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            other = "another process"
            with contextlib.suppress(OSError, ValueError, KeyError):
                named = json.loads(holder.read_text(encoding="utf-8"))
                other = f"process {named['pid']} on {named['host']}"
            why, fix = "two processes would overwrite each other's files", "wait for it, stop it, or name another folder"
            problem = Problem("TS014", f"{other} is working on this run", str(self.path), why, fix)
            raise RunError(problem) from error
        try:
            write_json(holder, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    @contextlib.contextmanager
    def perform(
        self, stage: str, folder: str, inputs: Mapping[str, str], *, live: Collection[str] = (), keep: bool = False
    ) -> Iterator[Path]:
        """Yield the folder for a stage's output; on success it is committed as `folder` and recorded.

        `live` names the files of a stage that writes its folder in place, so that it can be watched (training). They are
        removed first, unless `keep` says that the stage resumes from them. On an error a stage that is not live keeps its
        previous output, and nothing half-written remains. Raises RunError if another process works on the run, or if the
        folder holds files that the stage did not write.
        """
        with self._alone():
            yield from self._performed(stage, folder, inputs, live=live, keep=keep)

    def _performed(
        self, stage: str, folder: str, inputs: Mapping[str, str], *, live: Collection[str], keep: bool
    ) -> Iterator[Path]:
        final = self.path / folder
        begun = time.time()
        if live:
            if not keep:
                empty_folder(final, live)
            self._record(stage, {"status": "running", "inputs": dict(inputs), "outputs": {}, "argv": sys.argv})
            final.mkdir(parents=True, exist_ok=True)
            try:
                yield final
            except BaseException:
                with contextlib.suppress(OSError):  # the disk may be full; "running" means the same at the next start
                    self._record(stage, {"status": "failed", "inputs": dict(inputs), "outputs": {}, "argv": sys.argv})
                raise
        else:
            with commit_folder(final, stage.partition("/")[0]) as partial:
                yield partial
        if live:
            digests = {p.relative_to(final).as_posix(): sha256_file(p) for p in final.rglob("*") if p.is_file()}
        else:
            digests = committed_files(final)
        outputs = {f"{folder}/{name}": digests[name] for name in sorted(digests)}
        entry = {"status": "done", "inputs": dict(inputs), "outputs": outputs, "seconds": round(time.time() - begun, 3)}
        self._record(stage, {**entry, "argv": sys.argv, "versions": installed_versions()})


def eval_folder(digest: str) -> str:
    """The folder inside a run with the scores of the model with this digest."""
    return f"eval/{digest[:16]}/{EVAL_SUITE}"


def read_jsonl(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """The values of all lines of a JSONL file that tunesmith wrote; empty if the file does not exist.

    `torn`: text after the last newline may be an incomplete line and is not read.
    """
    if not path.is_file():
        return []
    # Not splitlines: it also splits at U+2028 and similar characters, which JSON leaves unescaped in text.
    lines = path.read_text(encoding="utf-8", errors="replace" if torn else "strict").split("\n")
    return [json.loads(line) for line in (lines[:-1] if torn else lines) if line]


def default_name(recipe: Recipe) -> str:
    """`<time>-<model>-<method>-<digest>`: sorts by time and distinguishes runs."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    model = Path(recipe.model).name[:40]
    return f"{now}-{model}-{recipe.method}-{sha256_json(recipe.model_dump(mode='json'))[:8]}"


def _knows(stage: str) -> bool:
    """Whether `Recipe.stage_digest` covers this stage."""
    return any(stage.partition("/")[0] in stages for stages in decided().values())


def create_run(resolved: ResolvedRecipe, path: Path) -> Run:
    """The run in `path`: created if it is new, otherwise opened.

    A changed recipe replaces the old one; each stage then repeats its work if its own part changed. Raises RunError if the
    folder holds something other than a run, cannot be written, or has a recipe.yaml that someone else changed; RecipeError
    for `method: auto`.
    """
    if resolved.recipe.method == "auto":
        why = "a run trains one method"
        fix = "begin with `tunesmith run` or `tunesmith prepare`, which plan first, or set method to full, lora or qlora"
        raise RecipeError(Problem("TS003", "the method is still auto", str(path), why, fix))
    try:
        new = _refuse_foreign(path)
        _refuse_edited(path / "recipe.yaml", resolved.recipe)
        path.mkdir(parents=True, exist_ok=True)
        run, text = Run(path, resolved.recipe), _stamped(dump_recipe(resolved))
        if new or not (path / "recipe.yaml").is_file() or (path / "recipe.yaml").read_bytes() != text.encode():
            with run._alone():  # not while a process uses the earlier recipe
                if new:
                    write_json(path / "run.json", {"format": 1, "stages": {}})
                write_text(path / "recipe.yaml", text)
    except OSError as error:
        raise RunError(
            Problem("TS013", f"cannot write: {error}", str(path), "a run is a folder", "choose another folder")
        ) from error
    return run


def _refuse_foreign(path: Path) -> bool:
    """Whether the path is still free or an empty folder. Raises RunError if it holds anything but a run."""
    if not path.exists():
        return True
    why, fix = "the run's files would mix with the files that are there", "name another folder"
    if not path.is_dir():
        raise RunError(Problem("TS010", "there is a file at this path", str(path), why, fix))
    if not any(path.iterdir()):
        return True
    try:
        status = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        status = None
    if not isinstance(status, dict) or status.get("format") != 1 or not isinstance(status.get("stages"), dict):
        raise RunError(Problem("TS010", "the folder is not empty and is not a run", str(path), why, fix))
    return False


def _refuse_edited(file: Path, recipe: Recipe) -> None:
    """Raise RunError if recipe.yaml was edited by hand and differs from the recipe that would replace it."""
    if not file.exists():
        return
    with contextlib.suppress(OSError, ValueError, RecipeError):
        text = file.read_text(encoding="utf-8")
        if text == _stamped(text.partition("\n")[2]) or _parsed(text, file) == recipe:
            return
    what = "its recipe.yaml was edited by hand and would be replaced"
    fix = f"use `{file}` itself as the recipe, move it away, or name another folder"
    raise RunError(Problem("TS015", what, str(file.parent), "tunesmith never replaces what it did not write", fix))


def _stamped(text: str) -> str:
    """A recipe's text, with a first line that shows whether it was edited later."""
    return f"# written by tunesmith, sha256 of what follows: {sha256_bytes(text.encode())}\n{text}"


def open_run(path: Path) -> Run:
    """The run in an existing folder. Raises RunError if there is none."""
    if not (path / "run.json").is_file() or not (path / "recipe.yaml").is_file():
        fix = "give the folder that `tunesmith run` or `tunesmith prepare` created"
        raise RunError(Problem("TS010", "not a run folder", str(path), "all stages work in a run folder", fix))
    file = path / "recipe.yaml"
    return Run(path, _parsed(file.read_text(encoding="utf-8"), file))


def _parsed(text: str, file: Path) -> Recipe:
    """The recipe of a run; its paths are absolute."""
    return parse_recipe(text, str(file), base=Path("/")).recipe
