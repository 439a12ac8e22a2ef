"""The data stage: every incoming row is trained on, held out, or rejected with a reason.

Rows stream: chunks go through `work` (in several processes if there are many), encoded rows go to an intermediate Arrow file,
`whole` assigns each row to a split by what it keeps of it, and a second pass over that file writes the sets.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tunesmith.chat.named import named_template
from tunesmith.chat.probe import probe
from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import read_json, sha256_file, sha256_json, write_json, write_text
from tunesmith.io.documents import folder_digest, reader_of
from tunesmith.io.folders import HUB, hub_commit
from tunesmith.io.rows import Row
from tunesmith.io.terminal import make_console
from tunesmith.models.load import locate, model_digest
from tunesmith.models.rope import check_scalable, window
from tunesmith.quality import Finding, Overlap, common_segments
from tunesmith.recipe import NAMED_TEMPLATES, OBJECTIVES, DataSection, Recipe, RowKind
from tunesmith.runs import Run
from tunesmith.runs.decisions import read_decisions
from tunesmith.stages.prepare.candidate import Candidate
from tunesmith.stages.prepare.files import marked_sample
from tunesmith.stages.prepare.ledger import Ledger, Problems
from tunesmith.stages.prepare.output import IntermediateRows, Lines, write_sets
from tunesmith.stages.prepare.overlong import DECISIONS
from tunesmith.stages.prepare.pool import chunked, worked
from tunesmith.stages.prepare.report import render
from tunesmith.stages.prepare.testset import write_test
from tunesmith.stages.prepare.whole import OUT, WholeSet
from tunesmith.stages.prepare.work import REASONS, Chunk, Rejection, Settings, Worker, read

_COMMON_ROWS = 2000  # searched for lines that many rows share
_SAMPLES = 20  # rows shown in samples.txt

#: What the notes of an encoded row mean.
NOTES = {
    "last-answer-only": "the template rewrites earlier answers, so only the last one is labelled",
    "end-of-turn-added": "the template does not end turns, so the tokenizer's eos was appended to the last answer",
    "system-dropped": "the template drops the system turn",
    "document-split": "longer than data.max_length, so they continue in further rows",
    "no-end-of-document": "the tokenizer has no eos to end them with",
}


def prepare(run: Run) -> dict[str, Any]:
    """Write the run's `data/` and return its ledger; a no-op when rows, template and settings are unchanged.

    Unless the recipe rejects bad rows, raises DataError naming every kind of bad row (up to 20), and writes nothing.
    """
    recipe = run.recipe
    folder = locate(recipe.model, recipe.revision)
    inputs = _inputs(recipe, folder)
    if not run.is_current("prepare", inputs):
        with run.perform("prepare", "data", inputs) as target:
            _Preparation(run, folder, target).write()
    ledger: dict[str, Any] = read_json(run.path / "data" / "ledger.json")
    return ledger


def _inputs(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Digests of what the stage reads. The number of processes is not part of it."""
    inputs = {"recipe": recipe.stage_digest("prepare")}
    inputs |= {"review": read_decisions(Path(recipe.data.review)).digest, "model": model_digest(folder)}
    test = recipe.data.test_part
    rows = {} if test is None else {"test": test.path}
    rows |= {f"train {number}" if number else "train": part.path for number, part in enumerate(recipe.data.parts)}
    others = {"chat_template": recipe.data.chat_template} | {f"overlap {name}": path for name, path in recipe.data.overlap}
    documents = OBJECTIVES[recipe.objective].rows == "document"
    inputs |= {name: _path_digest(path, documents=documents) for name, path in rows.items()}
    return inputs | {name: _path_digest(path) for name, path in others.items() if path is not None}


def _path_digest(name: str, *, documents: bool = False) -> str:
    if name.startswith(HUB):
        return hub_commit(name)
    path = Path(name)
    if path.is_dir() and documents:
        return folder_digest(path)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return sha256_json({each.relative_to(path).as_posix(): sha256_file(each) for each in files})
    return sha256_file(path) if path.is_file() else "missing"


class _Preparation:
    """One run of the stage, writing into `target`."""

    def __init__(self, run: Run, model_folder: Path, target: Path) -> None:
        self._run, self._recipe, self._data, self._target = run, run.recipe, run.recipe.data, target
        self._folder, self._kind = model_folder, OBJECTIVES[run.recipe.objective].rows
        self._ledger = Ledger(self._data.parts)
        self._problems = Problems()
        self._rejects = Lines(target / "rejects.jsonl")
        self._unused = Lines(target / "unused.jsonl")
        self._findings = Lines(target / "findings.jsonl")
        kind = "text" if self._kind == "document" else "conversation"
        self._whole = WholeSet(self._data, self._recipe.seed, self._say, self._reject, kind)
        self._probed: dict[str, Any] = {}

    def write(self) -> None:
        """Read all rows, decide about each, write the sets and their reports."""
        data, ledger = self._data, self._ledger
        positions = _positions(self._recipe, self._folder)
        settings = Settings(
            data, self._kind, self._folder, _template_source(data), frozenset(), read_decisions(Path(data.review))
        )
        rows = _rows(data, self._kind)
        head = list(itertools.islice(rows, _COMMON_ROWS))
        settings = _with_common(settings, head)
        worker = Worker(settings)
        if (test := data.test_part) is not None:
            ledger.test = write_test(test, data, self._kind, worker, self._whole, self._target)
        intermediate = IntermediateRows(self._target, self._kind)
        with _progress() as progress:
            task = progress.add_task("rows", total=None)
            for chunk in worked(chunked(itertools.chain(head, rows)), worker, settings):
                self._take(chunk, intermediate)
                progress.advance(task, chunk.rows_in.total())
        intermediate.close()
        self._problems.raise_any()
        if not ledger.rows_in:
            why = "there is nothing to train on"
            what = "the data file holds no rows"
            raise DataError(Problem("TS103", what, data.parts[0].path, why, "write rows, or check the path"))
        ledger.more["balance"] = self._whole.settle(data.heldout)
        if not any(split != OUT for split in self._whole.splits):
            raise DataError(_nothing_left(ledger, data))
        written = write_sets(intermediate, self._whole, self._target, ledger, _SAMPLES, positions)
        self._rejects.close()
        self._unused.close()
        self._findings.close()
        self._tell(worker)
        samples = (marked_sample(row, worker.tokenizer) for row in written.shown)
        write_text(self._target / "samples.txt", "\n".join(samples))
        counts = ledger.as_dict()
        write_json(self._target / "ledger.json", counts)
        self._events(counts, written.beyond, positions)
        page = render(self._recipe, counts, written.shown, worker.tokenizer, self._probed)
        write_text(self._target / "report.html", page)

    def _take(self, chunk: Chunk, intermediate: IntermediateRows) -> None:
        """Count a chunk, and pass its rows on."""
        ledger = self._ledger
        ledger.rows_in.update(chunk.rows_in)
        ledger.rows_added += chunk.rows_added
        for name in ("formats", "lengths", "overlong"):
            getattr(ledger, name).update(getattr(chunk, name))
        for where, finding in chunk.findings:
            self._say(where, finding)
        for source, problem in chunk.problems:
            if self._data.on_bad_row == "reject":
                self._reject(Rejection(problem.where, source, REASONS[problem.code], problem.what))
            else:
                self._problems.add(problem)
        for rejection in chunk.rejections:
            self._reject(rejection)
        for made in chunk.made:
            ledger.notes.update(made.notes)
            self._whole.add(made)
        if chunk.batch is not None:
            intermediate.write(chunk.batch)

    def _say(self, where: str, finding: Finding) -> None:
        self._ledger.findings.setdefault(finding.rule, Counter())[finding.action] += 1
        self._findings.write({"where": where, "rule": finding.rule, "action": finding.action, "detail": finding.detail})

    def _reject(self, rejection: Rejection) -> None:
        ledger = self._ledger
        rows, reasons, lines = (
            (ledger.rows_unused, ledger.unused, self._unused)
            if rejection.unused
            else (ledger.rows_rejected, ledger.reasons, self._rejects)
        )
        rows[rejection.source] += 1
        reasons[rejection.reason] += 1
        lines.write({"where": rejection.where, "reason": rejection.reason, "detail": rejection.detail})

    def _tell(self, worker: Worker) -> None:
        """Record facts about the template, if there is one, and about the benchmarks."""
        if worker.template is not None:
            self._probed = probe(worker.template)
            write_text(self._target / "chat_template.jinja", worker.template.source)
            write_json(self._target / "template.json", self._probed)
            self._ledger.more["template"] = {
                "name": self._data.chat_template or "the tokenizer's own",
                "digest": self._probed["digest"],
                "findings": self._probed["findings"],
            }
        overlap = Overlap(self._data.overlap)
        self._ledger.more["overlap"] = {
            name: {"items": items, "too_short": overlap.too_short[name]} for name, items in overlap.items.items()
        }

    def _events(self, counts: dict[str, Any], beyond: int, positions: int | None) -> None:
        def event(code: str, message: str, **facts: Any) -> None:
            self._run.event(self._target, code, message, **facts)

        if beyond:
            text = (
                f"{beyond} rows are longer than the model's {positions} positions: lower data.max_length, or set rope_scaling"
            )
            event("rows-beyond-window", text, count=beyond, window=positions)
        for key, code, said in (("reasons", "rows-rejected", "left out"), ("unused", "rows-unused", "not used")):
            for reason, count in counts[key].items():
                event(code, f"{count} rows {said}: {reason}", reason=reason, count=count)
        for note, count in counts["notes"].items():
            event(note, f"{count} rows: {NOTES[note]}", count=count)
        for decision, count in counts["overlong"].items():
            event("overlong", f"{count} {DECISIONS[decision]}", decision=decision, count=count)
        found = [(rule, *each) for rule, actions in counts["findings"].items() for each in actions.items()]
        for rule, action, count in found:
            event("finding", f"{count} times {rule}: {action}", rule=rule, action=action, count=count)
        for finding in self._probed.get("findings", ()):
            event("template", finding["detail"], rule=finding["rule"])
        rows = counts.get("pieces", {}).get("train", counts["rows_train"])
        if rows < 1000:
            event("few-rows", f"{rows} rows to train on: expand the data first", count=rows)


def _nothing_left(ledger: Ledger, data: DataSection) -> Problem:
    why = f"{ledger.rows_in.total()} rows came in and {ledger.rows_rejected.total()} were rejected"
    detail = ", ".join(f"{count} {reason}" for reason, count in [*ledger.reasons.items(), *ledger.unused.items()])
    return Problem("TS109", f"no row is left to train on ({detail})", data.parts[0].path, why, "correct the data")


def _positions(recipe: Recipe, folder: Path) -> int | None:
    """How many positions the model has, scaled as the recipe says. Raises ModelError if they cannot be scaled that way."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if recipe.rope_scaling is not None:
        check_scalable(config, folder)
    return window(config, recipe.rope_scaling)


def _rows(data: DataSection, kind: RowKind) -> Iterator[tuple[int, Row]]:
    """All rows of all sources in order, each with its source index."""
    read = reader_of(documents=kind == "document")
    for number, part in enumerate(data.parts):
        for row in read(part.path, part.split):
            yield number, row


def _with_common(settings: Settings, head: Sequence[tuple[int, Row]]) -> Settings:
    """The settings with the lines that many of the first rows share, which say nothing about the similarity of two rows."""
    parts = settings.data.parts
    made = (read(row, parts[source], settings, Counter()) for source, row in head if row.problem is None)
    return replace(settings, common=common_segments(row.messages for row in made if isinstance(row, Candidate)))


def _template_source(data: DataSection) -> str | None:
    if data.chat_template is None:
        return None
    if data.chat_template in NAMED_TEMPLATES:
        return named_template(data.chat_template)
    path = Path(data.chat_template)
    if not path.is_file():
        why = "rows must be rendered in training the way the model will be prompted"
        raise DataError(Problem("TS120", "the chat template file does not exist", str(path), why, "check the path"))
    return path.read_text(encoding="utf-8")


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("prepare"), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    console = make_console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
