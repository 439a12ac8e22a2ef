"""Makes more train rows: the last question of a row paraphrased, its answer unchanged.

A candidate is accepted if it is not a near-duplicate of an existing question, is in its parent's language, and keeps what the
answer depends on: every number of the question, and every value of the answer that occurs in the question. The answer, and so
the label, is the parent's own. These checks do not show whether the meaning is the same; `tunesmith review` is for that.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.chat.formats import Message, to_messages
from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import foreign, jsonl_text, read_json, sha256_bytes, sha256_file, write_json, write_text
from tunesmith.io.rows import read_rows
from tunesmith.quality.duplicates import NearDuplicates
from tunesmith.quality.language import language
from tunesmith.recipe import Recipe
from tunesmith.stages.augment.ask import Cache, Question, ask_all

_SYSTEM = (
    "You rewrite a user's message in other words. Keep its meaning, language, names, numbers and everything in quotes exactly. "
    "Do not answer it. Reply with the rewritten message alone."
)
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_LEAST_VALUE = 2  # characters; shorter values of an answer need not be kept


@dataclass(frozen=True)
class Parent:
    """A row to paraphrase: its location, its conversation, and which turn is the last question."""

    where: str
    messages: list[Message]
    turn: int

    @property
    def question(self) -> str:
        return str(self.messages[self.turn]["content"])


def augment(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Write `augment.out` and its summary, and return the summary: counts of parents, requests, rows, refusals by reason.

    A second run repeats no request. Raises AugmentError without an endpoint, DataError without a usable row, RunError if `out`,
    or a file next to it, is not what an earlier run wrote.
    """
    settings, out = recipe.augment, Path(recipe.augment.out)
    summary_path = out.with_name(f"{out.name}.summary.json")
    earlier = _earlier(out, summary_path)
    parents = list(_parents(recipe))
    if not parents:
        why, fix = "there is nothing to paraphrase", "check data.train and data.format"
        raise DataError(Problem("TS109", "no row has a question before an answer", recipe.data.train, why, fix))
    cache = Cache(out.with_name(f"{out.name}.cache"))
    known = len(cache.answers)
    questions = [(parent, _question(parent, number)) for number in range(settings.paraphrases) for parent in parents]
    answers, left = ask_all([question for _, question in questions], settings, cache)
    rows, refused = _checked(recipe, parents, [(parent, answers.get(question)) for parent, question in questions])
    text = jsonl_text(rows)
    summary = {
        "parents": len(parents),
        "requests": len(cache.answers) - known,
        "from_cache": len(answers) - (len(cache.answers) - known),
        "not_asked": left,
        "tokens": cache.tokens,
        "rows": len(rows),
        "refused": dict(sorted(refused.items())),
        "sha256": sha256_bytes(text.encode()),
        "replaces": earlier,
    }
    write_json(summary_path, summary)  # first, so that it identifies `out` as ours with old or new content
    write_text(out, text)
    if left:
        console.print(f"budget reached: {left} paraphrases were not requested (augment.max_requests, max_tokens)")
    return summary


def _earlier(out: Path, summary_path: Path) -> str | None:
    """Digest of the rows that an earlier run wrote; None if there are none. Raises RunError if `out` is something else."""
    known: dict[str, Any] = {}
    if summary_path.exists():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = dict(read_json(summary_path))
        if "sha256" not in known or "replaces" not in known:
            raise foreign(summary_path, "it is not a summary of augment")
    if not out.exists():
        return None
    digest = sha256_file(out) if out.is_file() else None
    if digest is None or digest not in {known.get("sha256"), known.get("replaces")}:
        raise foreign(out, "it is not the file that augment wrote")
    return digest


def _parents(recipe: Recipe) -> Iterator[Parent]:
    """Rows whose last turn answers a question; `prepare` reports the others and unreadable ones."""
    for row in read_rows(Path(recipe.data.train)):
        messages = row.problem or to_messages(row.value or {}, row.where, recipe.data.format)
        if isinstance(messages, Problem):
            continue
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and messages[-2]["role"] == "user":
            yield Parent(row.where, messages, len(messages) - 2)


def _question(parent: Parent, number: int) -> Question:
    return Question((("system", _SYSTEM), ("user", parent.question)), number)


def _checked(
    recipe: Recipe, parents: list[Parent], candidates: list[tuple[Parent, str | None]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows made of the candidates that pass, and counts of the reasons why others do not."""
    index = NearDuplicates(recipe.data.duplicates.threshold or 1.0, recipe.data.duplicates.num_perm)
    for parent in parents:
        index.add(parent.where, index.signature(parent.question))
    rows: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    for parent, text in candidates:
        if text is None:
            continue
        candidate = text.strip()
        reason = refusal(parent.question, parent.messages[-1]["content"], candidate)
        if reason is None and index.add(f"new:{len(rows)}", index.signature(candidate)) is not None:
            reason = "duplicate"
        if reason is not None:
            refused[reason] += 1
            continue
        messages = [dict(message) for message in parent.messages]
        messages[parent.turn]["content"] = candidate
        rows.append({"messages": messages, "augmented_from": parent.where})
    return rows, refused


def refusal(question: str, answer: str, candidate: str) -> str | None:
    """Why a paraphrase cannot replace its question: `empty`, `other-language`, `lost-number`, `lost-value`; or None."""
    if not candidate:
        return "empty"
    before, after = language(question), language(candidate)
    if before is not None and after is not None and before != after:
        return "other-language"
    if Counter(_NUMBER.findall(question)) != Counter(_NUMBER.findall(candidate)):
        return "lost-number"
    kept = candidate.lower()
    lost = any(value.lower() in question.lower() and value.lower() not in kept for value in _values(answer))
    return "lost-value" if lost else None


def _values(answer: str) -> Iterator[str]:
    """The text values of a JSON answer; for any other answer, its text."""
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):
        parsed = answer
    stack = [parsed]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str) and len(value) >= _LEAST_VALUE:
            yield value
