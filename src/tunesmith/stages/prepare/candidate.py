"""A row on its way through `prepare`: parsed into the form that its objective learns from, then encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.chat.document import Document, DocumentEncoder, to_document, to_pieces
from tunesmith.chat.formats import Message, to_messages
from tunesmith.chat.judged import Asked, Judged, judged_or_plain, to_asked, to_judged
from tunesmith.chat.preference import Pair, chosen_messages, equal_answers, to_pair
from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.errors import Problem
from tunesmith.io.atomic import sha256_json
from tunesmith.recipe import RowKind

#: What a row may be parsed into.
ReadRow = list[Message] | Pair | Judged | Asked | Document

#: Parses a row into one of them: (row, where, format, system).
Reader = Callable[[Mapping[str, Any], str, str, str | None], ReadRow | Problem]

#: The reader of each kind of row.
READERS: dict[RowKind, Reader] = {
    "conversation": to_messages,
    "document": to_document,
    "pair": to_pair,
    "judged": to_judged,
    "prompt": to_asked,
}

#: The same for a test set. It may also mix conversations with pairs or judged answers, and pairs with conversations.
TEST_READERS: dict[RowKind, Reader] = {
    **READERS,
    "conversation": chosen_messages,
    "pair": chosen_messages,
    "judged": judged_or_plain,
}


@dataclass(frozen=True)
class Candidate:
    """A row being prepared: its location, its conversation, and once encoded, its token ids.

    For a pair, `messages` is the chosen conversation and `rejected` the other one. A document has a text instead, and once
    encoded its pieces. A judged answer or a prompt is also in `more`.
    """

    where: str
    messages: list[Message]
    rejected: list[Message] | None = None
    encoded: Encoded | None = None
    encoded_rejected: Encoded | None = None
    text: str | None = None
    pieces: tuple[Encoded, ...] = ()
    more: Judged | Asked | None = None
    prompt_ids: list[int] | None = None

    @property
    def key(self) -> str:
        """Equal for rows with the same conversation, pair or text."""
        label = self.more.label if isinstance(self.more, Judged) else None
        return sha256_json([self.messages, self.rejected, self.text, label])

    @property
    def unwanted(self) -> bool:
        """Whether its answer is judged undesirable."""
        return isinstance(self.more, Judged) and not self.more.label

    @property
    def sides(self) -> list[Encoded]:
        """What was encoded: one conversation, both of a pair, or a document's pieces."""
        return [side for side in (self.encoded, self.encoded_rejected, *self.pieces) if side is not None]

    @property
    def length(self) -> int:
        """Tokens of the longer side, or of the whole document."""
        if self.pieces:
            return 1 + sum(len(piece.input_ids) - 1 for piece in self.pieces)
        return max(len(side.input_ids) for side in self.sides)

    @property
    def shown(self) -> dict[str, Any]:
        """Its JSON form: a conversation, or a text."""
        return {"messages": self.messages} if self.text is None else {"text": self.text}

    @property
    def rows(self) -> list[Candidate]:
        """The training rows that it becomes: itself, or one per piece of a document."""
        count = len(self.pieces)
        names = [self.where] if count == 1 else [f"{self.where} (piece {n} of {count})" for n in range(1, count + 1)]
        pieces = zip(names, self.pieces, strict=True)
        return [replace(self, where=where, encoded=piece, pieces=()) for where, piece in pieces] if count else [self]


def candidate_of(where: str, made: ReadRow) -> Candidate:
    """The candidate for what a reader returned."""
    if isinstance(made, Document):
        return Candidate(where, [], text=made.text)
    if isinstance(made, Pair):
        return Candidate(where, made.chosen, made.rejected)
    return Candidate(where, made.messages, more=made) if isinstance(made, Judged | Asked) else Candidate(where, made)


def with_messages(candidate: Candidate, messages: list[Message]) -> Candidate:
    """The candidate with its fixed turns, of which none may have been removed."""
    more = candidate.more
    if isinstance(more, Judged):
        more = Judged(messages, more.label)
    elif isinstance(more, Asked):
        more = Asked(messages, None) if more.reference is None else Asked(messages[:-1], messages[-1]["content"])
    return replace(candidate, messages=messages, more=more)


def prompt_of(candidate: Candidate) -> list[Message] | None:
    """The messages that the answer replies to; None if nothing is asked, so that rows cannot be matched by prompt."""
    if isinstance(candidate.more, Asked):
        return candidate.more.prompt
    prompts = prompts_of(candidate.messages)
    return prompts[-1] if prompts else None


def prompts_of(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages before each answer that follows a user turn."""
    asked = False
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            found.append(list(messages[:number]))
        asked = asked or message["role"] == "user"
    return found


def encoded(chunk: Sequence[Candidate], template: ChatTemplate) -> Iterator[Candidate | Problem]:
    """Each candidate encoded, or its problem. For pairs and judged answers only the last answers are labelled."""
    if chunk and isinstance(chunk[0].more, Asked):
        yield from _encoded_prompts(chunk, template)
        return
    pairs = [candidate for candidate in chunk if candidate.rejected is not None]
    last_answer = bool(pairs) or any(candidate.more is not None for candidate in chunk)
    firsts = template.encode([candidate.messages for candidate in chunk], last_answer=last_answer)
    others = iter(template.encode([pair.rejected for pair in pairs if pair.rejected is not None], last_answer=True))
    for candidate, first in zip(chunk, firsts, strict=True):
        other = next(others) if candidate.rejected is not None else None
        if isinstance(first, Problem):
            yield replace(first, where=candidate.where)
        elif isinstance(other, Problem):
            yield replace(other, where=candidate.where)
        elif other is not None and first.input_ids == other.input_ids:
            yield equal_answers(candidate.where)  # they differed only in what the template trims
        else:
            yield replace(candidate, encoded=first, encoded_rejected=other)


def _encoded_prompts(chunk: Sequence[Candidate], template: ChatTemplate) -> Iterator[Candidate | Problem]:
    """Each prompt as the model sees it; with a reference, also the whole conversation, for the held-out loss."""
    asked = [candidate.more for candidate in chunk if isinstance(candidate.more, Asked)]
    prompts = template.encode_prompts([each.prompt for each in asked])
    answered = iter(template.encode([each.messages for each in asked if each.reference is not None], last_answer=True))
    for candidate, each, prompt in zip(chunk, asked, prompts, strict=True):
        whole = prompt if each.reference is None else next(answered)
        if isinstance(prompt, Problem):
            yield replace(prompt, where=candidate.where)
        elif isinstance(whole, Problem):
            yield replace(whole, where=candidate.where)
        else:
            yield replace(candidate, encoded=whole, prompt_ids=prompt.input_ids)


def encoded_documents(chunk: Sequence[Candidate], encoder: DocumentEncoder, max_length: int) -> Iterator[Candidate | Problem]:
    """Each document in pieces of at most `max_length`, or its problem."""
    for candidate, ids in zip(chunk, encoder.encode([each.text or "" for each in chunk]), strict=True):
        if isinstance(ids, Problem):
            yield replace(ids, where=candidate.where)
        else:
            yield replace(candidate, pieces=tuple(to_pieces(ids, max_length)))
