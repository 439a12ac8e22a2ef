"""Rows longer than `data.max_length`: rejected, truncated at an earlier turn, or split between turns into several rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.chat.formats import Message
from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.errors import Problem
from tunesmith.recipe import DataSection
from tunesmith.stages.prepare.candidate import Candidate

#: The decision about an overlong row, as `ledger.json` spells it.
DECISIONS = {
    "rejected": "rows longer than data.max_length were rejected",
    "turns-dropped": "rows longer than data.max_length lost later turns",
    "answer-cut": "rows longer than data.max_length were truncated inside the answer",
    "split": "rows longer than data.max_length were split between turns into several",
}


@dataclass(frozen=True)
class Fitted:
    """The outcome for an overlong row: the rows that fit, the locations of parts that do not, and the decision."""

    decision: str
    rows: list[Candidate]
    lost: list[str]


def fitted(candidate: Candidate, template: ChatTemplate, data: DataSection) -> Fitted:
    """The row made to fit as `data.overlong` says. Pairs, judged answers and prompts are rejected: their end matters."""
    if candidate.rejected is not None or candidate.more is not None:
        return Fitted("rejected", [], [candidate.where])
    if data.overlong == "truncate":
        if shorter := _longest_start(candidate, template, data.max_length):
            return Fitted("turns-dropped", [shorter], [])
        if data.truncate_answers and (cut := _cut(candidate, data.max_length)):
            return Fitted("answer-cut", [cut], [])
    elif data.overlong == "split":
        rows, lost = _windows(candidate, template, data.max_length)
        if rows:
            return Fitted("split", rows, lost)
    return Fitted("rejected", [], [candidate.where])


def _fits(messages: list[Message], where: str, template: ChatTemplate, limit: int) -> Candidate | None:
    (made,) = template.encode([messages])
    fits = not isinstance(made, Problem) and len(made.input_ids) <= limit
    return Candidate(where, messages, encoded=made) if fits and isinstance(made, Encoded) else None


def _longest_start(candidate: Candidate, template: ChatTemplate, limit: int) -> Candidate | None:
    """The longest prefix that ends with an answer and fits, found by binary search."""
    ends = [number + 1 for number, message in enumerate(candidate.messages) if message["role"] == "assistant"]
    best, low, high = None, 0, len(ends) - 1
    while low <= high:
        middle = (low + high) // 2
        if made := _fits(candidate.messages[: ends[middle]], candidate.where, template, limit):
            best, low = made, middle + 1
        else:
            high = middle - 1
    return best


def _cut(candidate: Candidate, limit: int) -> Candidate | None:
    """The row truncated to `limit` ids; None if no labelled id is left."""
    whole = candidate.encoded
    if whole is None or not any(whole.loss_mask[:limit]):
        return None
    return replace(candidate, encoded=Encoded(whole.input_ids[:limit], whole.loss_mask[:limit], whole.notes))


def _rounds(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The opening system turn, and the rest split before each user turn."""
    head = list(messages[:1]) if messages[0]["role"] == "system" else []
    rounds: list[list[Message]] = []
    for message in messages[len(head) :]:
        if message["role"] == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return head, rounds


def _windows(candidate: Candidate, template: ChatTemplate, limit: int) -> tuple[list[Candidate], list[str]]:
    """Rows of as many rounds as fit, each with the system turn; and the locations of rounds that are too long alone."""
    head, rounds = _rounds(candidate.messages)
    tools = candidate.messages[0].get("tools")
    rows: list[Candidate] = []
    lost: list[str] = []
    start = 0
    while start < len(rounds):
        where = f"{candidate.where}#{len(rows) + len(lost) + 1}"
        made, count = _window(head, rounds[start:], tools, where, template, limit)
        if made is None:
            lost.append(where)
        else:
            rows.append(made)
        start += max(1, count)
    return rows, lost


def _window(
    head: list[Message], rounds: Sequence[list[Message]], tools: object, where: str, template: ChatTemplate, limit: int
) -> tuple[Candidate | None, int]:
    """The longest row of consecutive rounds from the first on, and how many rounds it has."""
    best, used, low, high = None, 0, 1, len(rounds)
    while low <= high:
        middle = (low + high) // 2
        messages = head + [message for each in rounds[:middle] for message in each]
        if tools and "tools" not in messages[0]:
            messages[0] = {**messages[0], "tools": tools}
        if made := _fits(messages, where, template, limit):
            best, used, low = made, middle, middle + 1
        else:
            high = middle - 1
    return best, used
