"""A reviewer's decisions about rows, and their sign-off.

Decisions are stored in the file that `data.review` names, one per line, keyed by the digest of the row as read. A decision
applies wherever the row is located, and no longer once the row changes. `prepare` calls `Decisions.apply` on every row before
anything else, and has `Decisions.digest` among its inputs (as `review`). The sign-off is stored in the run folder
(`review/signoff.json`) and covers the digest of what `prepare` wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, Problem, RunError
from tunesmith.io.atomic import jsonl_text, read_json, sha256_json, write_bytes
from tunesmith.runs.folder import Run

VERDICTS = ("accept", "reject", "edit")
LEAST_ROWS = 200  # of a sample, if there are that many


def row_digest(value: Mapping[str, Any]) -> str:
    """A row's identity: sha256 of its columns as read, independent of their order."""
    try:
        return sha256_json(dict(value))
    except UnicodeEncodeError:  # half of a surrogate pair
        return hashlib.sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Decisions:
    """Verdicts by row digest: {"row", "verdict", "by", "at"}, and "value", the new row, of an edit."""

    by_row: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the decisions that change rows (rejections and edits), independent of author and time."""
        changes = {row: entry.get("value") for row, entry in self.by_row.items() if entry["verdict"] != "accept"}
        return row_digest(changes)

    def apply(self, value: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The row to train on: the row itself, its edited version, or None if it was rejected."""
        if not self.by_row:
            return value
        decision = self.by_row.get(row_digest(value), {})
        if decision.get("verdict") == "reject":
            return None
        edited: Mapping[str, Any] = decision["value"] if decision.get("verdict") == "edit" else value
        return edited


def read_decisions(path: Path) -> Decisions:
    """The decisions in a review file; the last line about a row wins. Empty if there is no file. Raises DataError."""
    if not path.exists():
        return Decisions()
    if not path.is_file():
        why, fix = "decisions about rows are stored in a file", "name a file in data.review"
        raise DataError(Problem("TS132", "it is not a file", str(path), why, fix))
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not _is_decision(entry):
            what, fix = 'a line must be {"row": digest, "verdict": accept, reject or edit}', "correct the line, or delete it"
            why = "rows that a reviewer rejected could be trained on"
            raise DataError(Problem("TS132", what, f"{path}:{number}", why, fix))
        found[entry["row"]] = entry
    return Decisions(found)


def _is_decision(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("row"), str) or entry.get("verdict") not in VERDICTS:
        return False
    return entry["verdict"] != "edit" or isinstance(entry.get("value"), dict)


def add_decisions(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Append decisions to the file, in one rename. Raises DataError if it is not a review file."""
    read_decisions(path)
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_bytes(path, before + jsonl_text(dict(entry) for entry in entries).encode())


def draw_sample(rows: Mapping[str, Sequence[str]], count: int, seed: int) -> list[str]:
    """Locations of `count` rows (all, if there are fewer) drawn from {location: rules that matched the row}.

    Strata are source file x rule; rows without findings form their own. Strata contribute one row in turn, the rarest first,
    in the order of a seeded hash, so that the sample hardly changes when rows are removed. Returned in the order of `rows`.
    """
    ranked = sorted(rows, key=lambda where: hashlib.sha256(f"{seed} {where}".encode()).digest())
    strata: dict[tuple[str, str], list[str]] = {}
    for where in ranked:
        for rule in dict.fromkeys(rows[where] or ["none"]):
            strata.setdefault((where.rpartition(":")[0], rule), []).append(where)
    queues = [iter(strata[name]) for name in sorted(strata, key=lambda name: (len(strata[name]), name))]
    drawn: set[str] = set()
    while queues and len(drawn) < count:
        for queue in list(queues):
            found = next((where for where in queue if where not in drawn), None)
            if found is None:
                queues.remove(queue)
            elif len(drawn) < count:
                drawn.add(found)
    return [where for where in rows if where in drawn]


def require_signoff(run: Run) -> None:
    """Raise RunError unless the run's current prepared data is signed off and holds no row that review rejected or edited."""
    path = run.path / "review" / "signoff.json"
    digest = run.outputs_digest("prepare")
    why = "the recipe says data.require_review: true"
    if not path.is_file():
        fix = f"run `tunesmith review {run.path}`"
        raise RunError(Problem("TS130", "nobody has signed off the data", str(run.path), why, fix))
    signed = read_json(path)
    if signed["data"] != digest:
        fix = f"run `tunesmith review {run.path}` again; rows that have a decision are not shown again"
        raise RunError(Problem("TS130", "the data has changed since it was signed off", str(run.path), why, fix))
    if signed["rejected"] or signed["edited"]:
        what = f"{signed['rejected']} rejected and {signed['edited']} edited rows are still in the data unchanged"
        fix = "run `tunesmith prepare` on the recipe again, then `tunesmith review`, which shows only new rows"
        raise RunError(Problem("TS130", what, str(run.path), why, fix))
