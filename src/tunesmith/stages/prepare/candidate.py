"""A row on its way through `prepare`: read into a conversation or a pair, then encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.chat.formats import Message, to_messages
from tunesmith.chat.preference import Pair, equal_answers, to_pair
from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.errors import Problem
from tunesmith.io.atomic import sha256_json

#: Makes a conversation, or a pair of them, out of a row: (row, where, format, system).
Reader = Callable[[Mapping[str, Any], str, str, str | None], list[Message] | Pair | Problem]

#: Which rows each objective reads.
READERS: dict[str, Reader] = {"sft": to_messages, "dpo": to_pair}


@dataclass(frozen=True)
class Candidate:
    """A row on its way: where it stands, its conversation, and once encoded, its token ids.

    A pair's conversation is the chosen one; the rejected one stands beside it.
    """

    where: str
    messages: list[Message]
    rejected: list[Message] | None = None
    encoded: Encoded | None = None
    encoded_rejected: Encoded | None = None

    @property
    def key(self) -> str:
        """Equal for rows with the same conversation, or the same two."""
        return sha256_json([self.messages, self.rejected])

    @property
    def sides(self) -> list[Encoded]:
        """What was encoded: one conversation, or the two of a pair."""
        return [side for side in (self.encoded, self.encoded_rejected) if side is not None]

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(side.input_ids) for side in self.sides)


def candidate_of(where: str, made: list[Message] | Pair) -> Candidate:
    """The candidate of what a reader made."""
    return Candidate(where, made.chosen, made.rejected) if isinstance(made, Pair) else Candidate(where, made)


def prompt_of(messages: Sequence[Message]) -> list[Message] | None:
    """What stands before the last answer; None where nothing is asked there, so that nothing can be told alike."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    prompt = list(messages[:last])
    return prompt if any(message["role"] == "user" for message in prompt) else None


def encoded(chunk: Sequence[Candidate], template: ChatTemplate) -> Iterator[Candidate | Problem]:
    """Each candidate encoded, or its problem. Of a pair the last answers alone carry loss."""
    pairs = [candidate for candidate in chunk if candidate.rejected is not None]
    firsts = template.encode([candidate.messages for candidate in chunk], last_answer=bool(pairs))
    others = iter(template.encode([pair.rejected for pair in pairs if pair.rejected is not None], last_answer=True))
    for candidate, first in zip(chunk, firsts, strict=True):
        other = next(others) if candidate.rejected is not None else None
        if isinstance(first, Problem):
            yield replace(first, where=candidate.where)
        elif isinstance(other, Problem):
            yield replace(other, where=candidate.where)
        elif other is not None and first.input_ids == other.input_ids:
            yield equal_answers(candidate.where)  # they differed in what the template trims
        else:
            yield replace(candidate, encoded=first, encoded_rejected=other)
