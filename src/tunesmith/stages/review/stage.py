"""A review without its user interface: the rows to show, the decisions, the sign-off. The terminal and other front ends use it.

Every decision is in `review/session.json` of the run folder before the next row is shown, so a review can stop at any time.
The sign-off also adds the decisions to the file that `data.review` names, where the next `prepare` finds them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.chat.template import sides_of
from tunesmith.errors import Problem, RunError
from tunesmith.io.atomic import read_json, sha256_file, write_json
from tunesmith.io.documents import folder_digest, reader_of
from tunesmith.models.load import load_tokenizer, locate
from tunesmith.recipe import OBJECTIVES
from tunesmith.runs import Run, prepared_rows, read_jsonl
from tunesmith.runs.decisions import LEAST_ROWS, VERDICTS, add_decisions, draw_sample, read_decisions, row_digest

#: What `prepare` appends to a row's location when it splits the row into several.
_PART = re.compile(r"(?:#\d+| \(piece \d+ of \d+\))\Z")


@dataclass(frozen=True)
class Shown:
    """A row to decide on: its location, its source row, the rules that flagged it, and each side's text as (text, labelled)."""

    where: str
    value: dict[str, Any]
    findings: tuple[str, ...]
    sides: tuple[tuple[tuple[str, bool], ...], ...]


class Review:
    """A review of a prepared run. Raises RunError if `prepare` has not run, or the source rows have changed since."""

    def __init__(self, run: Run, count: int = LEAST_ROWS) -> None:
        self.run = run
        self.data_digest = run.outputs_digest("prepare")
        self._path = run.path / "review" / "session.json"
        self._rows = prepared_rows(run, "train")
        self._numbers = {where: number for number, where in enumerate(self._rows["where"])}
        self._tokenizer = load_tokenizer(locate(run.recipe.model, run.recipe.revision))
        self._findings = self._read_findings()
        rules = {where: [rule for rule, _ in self._found(where)] for where in self._numbers}
        self.places = draw_sample(rules, count, run.recipe.seed)
        self._values = self._read_sources()
        self.decisions: dict[str, dict[str, Any]] = self._earlier()

    def _read_findings(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for entry in read_jsonl(self.run.path / "data" / "findings.jsonl"):
            found.setdefault(entry["where"], []).append(
                (entry["rule"], f"{entry['rule']} ({entry['action']}): {entry['detail']}")
            )
        return found

    def _found(self, where: str) -> list[tuple[str, str]]:
        """Rule and text of each finding of a row, or of the document it is a piece of."""
        return self._findings.get(where) or self._findings.get(_PART.sub("", where), [])

    def _read_sources(self) -> dict[str, dict[str, Any]]:
        """The sampled rows as they are in the data file; for a part of a row or a piece of a document, the whole."""
        origins: dict[str, list[str]] = {}
        for where in self.places:
            origins.setdefault(_PART.sub("", where), []).append(where)
        found: dict[str, dict[str, Any]] = {}
        read = reader_of(documents=self._documents)
        parts = self.run.recipe.data.parts
        inputs = self.run.status()["stages"]["prepare"]["inputs"]
        for number, part in enumerate(parts):
            prepared = inputs.get(f"train {number}" if number else "train")
            if prepared in (None, self._digest(Path(part.path)) or prepared):
                for row in read(part.path, part.split):
                    found |= {where: row.value for where in origins.get(row.where, ()) if row.value}
        if missing := set(self.places) - set(found):
            what = f"{len(missing)} rows are no longer where `prepare` read them"
            why = "a decision would apply to a different row than the one shown"
            raise RunError(Problem("TS131", what, parts[0].path, why, "run `tunesmith prepare` again"))
        return found

    def _digest(self, path: Path) -> str | None:
        """The digest that `prepare` records for a file or a folder of documents; None for other sources."""
        if path.is_file():
            return sha256_file(path)
        return folder_digest(path) if path.is_dir() and self._documents else None

    @property
    def _documents(self) -> bool:
        return OBJECTIVES[self.run.recipe.objective].rows == "document"

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """Decisions of this session if it is about the same data, and what was accepted before.

        An edit counts as accepted once `prepare` has applied it: the row shown would be the reviewer's own text.
        """
        known = read_decisions(Path(self.run.recipe.data.review))
        applied = self.run.status()["stages"]["prepare"]["inputs"].get("review") == known.digest
        found = {}
        for where in self.places:
            digest = row_digest(self._values[where])
            verdict = known.by_row.get(digest, {}).get("verdict")
            if verdict == "accept" or (verdict == "edit" and applied):
                found[where] = {"row": digest, "verdict": "accept"}
        session = read_json(self._path) if self._path.is_file() else {}
        if session.get("data") == self.data_digest:
            found |= {where: entry for where, entry in session["decisions"].items() if where in self._values}
        return found

    def open_places(self) -> list[str]:
        """Sampled rows without a decision."""
        return [where for where in self.places if where not in self.decisions]

    def show(self, where: str) -> Shown:
        """A row with its labelled spans."""
        row = self._rows[self._numbers[where]]
        sides = tuple(tuple(side.spans(self._tokenizer)) for side in sides_of(row))
        return Shown(where, self._values[where], tuple(text for _, text in self._found(where)), sides)

    def decide(self, where: str, verdict: str, by: str, value: Mapping[str, Any] | None = None) -> None:
        """Record a verdict (accept, reject or edit; an edit has the new row as `value`) before anything else happens."""
        if verdict not in VERDICTS or (verdict == "edit") != (value is not None):
            raise AssertionError(f"no such decision: {verdict}")
        entry = {"row": row_digest(self._values[where]), "verdict": verdict, "by": by, "at": _now()}
        self.decisions[where] = entry if value is None else {**entry, "value": dict(value)}
        self._save()

    def undo(self, where: str) -> None:
        """Withdraw a decision of this session."""
        if self.decisions.pop(where, None) is not None:
            self._save()

    def _save(self) -> None:
        write_json(self._path, {"data": self.data_digest, "sample": self.places, "decisions": self.decisions})

    def sign(self, by: str) -> dict[str, Any]:
        """Sign off the data: write the decisions to the review file, then `review/signoff.json`, which is returned.

        Raises RunError while sampled rows are undecided.
        """
        if left := self.open_places():
            why, fix = "a sign-off covers the whole sample", "continue with `tunesmith review`"
            raise RunError(Problem("TS130", f"{len(left)} rows are undecided", str(self.run.path), why, fix))
        made = [{"where": where, **entry} for where, entry in self.decisions.items() if "by" in entry]
        add_decisions(Path(self.run.recipe.data.review), made)
        verdicts = [entry["verdict"] for entry in self.decisions.values()]
        counts = {
            name: verdicts.count(verdict) for name, verdict in zip(("accepted", "rejected", "edited"), VERDICTS, strict=True)
        }
        signed = {"data": self.data_digest, "by": by, "at": _now(), "rows": len(self.places), **counts}
        write_json(self.run.path / "review" / "signoff.json", signed)
        return signed


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
