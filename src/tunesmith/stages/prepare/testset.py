"""The task's test rows: conversations with a reference answer, generated from and never trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith.chat.formats import Message, mapped
from tunesmith.chat.preference import chosen_messages
from tunesmith.errors import DataError, Problem
from tunesmith.io.rows import Row, read_rows
from tunesmith.recipe import DataSection
from tunesmith.stages.prepare.candidate import Candidate
from tunesmith.stages.prepare.ledger import Problems
from tunesmith.stages.prepare.output import Lines
from tunesmith.stages.prepare.whole import WholeSet
from tunesmith.stages.prepare.work import REASONS, Worker, digests


def write_test(data: DataSection, worker: Worker, whole: WholeSet, target: Path) -> dict[str, Any]:
    """Write test.jsonl and return its counts; `whole` learns the rows, so that none of them is trained on.

    Rows are kept as they came, since that is how the model will be asked; they are compared as train rows are cleaned. Of a
    preference row the chosen answer is the reference. Raises DataError as for train rows.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    problems = Problems()
    lines = Lines(target / "test.jsonl")
    for row in read_rows(data.test or ""):
        counts["rows_in"] += 1
        messages = _reference(row, data)
        if isinstance(messages, Problem):
            if data.on_bad_row == "reject" or messages.code == "TS502":
                reasons[_reason(messages)] += 1
            else:
                problems.add(messages)
            continue
        cleaned = worker.cleaned(messages)
        key, prompt, _ = digests(Candidate(row.where, cleaned))
        whole.add_test(key, prompt, worker.signature(cleaned), row.where)
        counts["rows_test"] += 1
        lines.write({"where": row.where, "messages": messages})
    lines.close()
    problems.raise_any()
    if not counts["rows_in"]:
        why = "there is nothing to score on"
        raise DataError(Problem("TS103", "the data file holds no rows", str(data.test), why, "write rows, or check the path"))
    rejected = dict(sorted(reasons.items()))
    return {
        "rows_in": counts["rows_in"],
        "rows_rejected": reasons.total(),
        "reasons": rejected,
        "rows_test": counts["rows_test"],
    }


def _reference(row: Row, data: DataSection) -> list[Message] | Problem:
    """The conversation of a test row, which ends with its reference answer."""
    if row.problem is not None:
        return row.problem
    value = mapped(row.value or {}, data.columns, row.where)
    messages = value if isinstance(value, Problem) else chosen_messages(value, row.where, data.format, data.system)
    if not isinstance(messages, Problem) and messages[-1]["role"] != "assistant":
        why = "there is no answer to compare with"
        return Problem("TS502", "the last turn is not an assistant's", row.where, why, "end the row with the answer")
    return messages


def _reason(problem: Problem) -> str:
    return "no-reference" if problem.code == "TS502" else REASONS[problem.code]
