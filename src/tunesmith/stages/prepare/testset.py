"""The task's test rows, never trained on: conversations with a reference answer, or documents whose loss is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.chat.columns import mapped
from tunesmith.errors import DataError, Problem
from tunesmith.io.documents import reader_of
from tunesmith.io.rows import Row
from tunesmith.recipe import DataSection, PartSection, RowKind
from tunesmith.stages.prepare.candidate import TEST_READERS, Candidate, candidate_of, encoded_documents
from tunesmith.stages.prepare.files import SCHEMA, ArrowWriter, intermediate_batch
from tunesmith.stages.prepare.ledger import Problems
from tunesmith.stages.prepare.output import Lines
from tunesmith.stages.prepare.whole import WholeSet
from tunesmith.stages.prepare.work import REASONS, Worker, digests


def write_test(
    part: PartSection, data: DataSection, kind: RowKind, worker: Worker, whole: WholeSet, target: Path
) -> dict[str, Any]:
    """Write test.jsonl, or test.arrow for documents, and return its counts; `whole` keeps the rows out of the train set.

    Rows are kept as they came, since that is how the model will be prompted; for comparison they are cleaned like train rows.
    The reference is the chosen answer of a preference row, or the answer of a judged row if it is desirable. Raises DataError
    as for train rows.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    problems = Problems()
    out = _Documents(target) if worker.encoder is not None else _Conversations(target)
    for row in reader_of(documents=kind == "document")(part.path, part.split):
        counts["rows_in"] += 1
        for made in _encoded(_reference(row, part, data.system, kind), worker, data):
            if not isinstance(made, Problem):
                compared = worker.cleaned(made)
                key, prompt, _ = digests(compared)
                whole.add_test(key, prompt, worker.test_signature(compared), row.where)
                counts["rows_test"] += 1
                out.write(made)
            elif data.on_bad_row == "reject" or made.code == "TS502":
                reasons[_reason(made)] += 1
            else:
                problems.add(made)
    out.close()
    problems.raise_any()
    if not counts["rows_in"]:
        why = "there is nothing to score on"
        raise DataError(Problem("TS103", "the data file holds no rows", part.path, why, "write rows, or check the path"))
    rejected = dict(sorted(reasons.items()))
    return {
        "rows_in": counts["rows_in"],
        "rows_rejected": reasons.total(),
        "reasons": rejected,
        "rows_test": counts["rows_test"],
    }


class _Conversations:
    """test.jsonl."""

    def __init__(self, target: Path) -> None:
        self._lines = Lines(target / "test.jsonl")

    def write(self, row: Candidate) -> None:
        self._lines.write({"where": row.where, "messages": row.messages})

    def close(self) -> None:
        self._lines.close()


class _Documents:
    """test.arrow, with one row per piece of a document."""

    def __init__(self, target: Path) -> None:
        self._rows = ArrowWriter(target / "test.arrow", SCHEMA)

    def write(self, row: Candidate) -> None:
        self._rows.write(intermediate_batch([row], "document"))

    def close(self) -> None:
        self._rows.close()


def _encoded(row: Candidate | Problem, worker: Worker, data: DataSection) -> Iterator[Candidate | Problem]:
    """A document in its pieces; a conversation as it is, since it is rendered at generation time."""
    if isinstance(row, Problem) or worker.encoder is None:
        yield row
    else:
        yield from encoded_documents([row], worker.encoder, data.max_length)


def _reference(row: Row, part: PartSection, system: str | None, kind: RowKind) -> Candidate | Problem:
    """The conversation of a test row, which ends with its reference answer; or its document."""
    if row.problem is not None:
        return row.problem
    value = mapped(row.value or {}, part.columns or {}, row.where)
    if isinstance(value, Problem):
        return value
    made = TEST_READERS[kind](value, row.where, part.format or "auto", system)
    if isinstance(made, Problem):
        return made
    candidate = candidate_of(row.where, made)
    why = "there is no answer to compare with"
    if candidate.unwanted:
        return Problem("TS502", "the answer is judged undesirable", row.where, why, "give a desirable answer")
    if candidate.text is None and candidate.messages[-1]["role"] != "assistant":
        return Problem("TS502", "the last turn is not an assistant's", row.where, why, "end the row with the answer")
    return candidate


def _reason(problem: Problem) -> str:
    return "no-reference" if problem.code == "TS502" else REASONS[problem.code]
