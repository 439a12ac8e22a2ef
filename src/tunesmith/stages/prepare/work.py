"""Per-row work, in any process: read, clean, check, encode, fit. Equal chunks give equal results anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tunesmith.chat.columns import mapped
from tunesmith.chat.document import DocumentEncoder
from tunesmith.chat.formats import Message, detected
from tunesmith.chat.judged import Asked
from tunesmith.chat.template import ChatTemplate
from tunesmith.errors import CODES, Problem
from tunesmith.io.atomic import sha256_json
from tunesmith.io.rows import Row
from tunesmith.models.load import load_tokenizer
from tunesmith.quality import Checker, Finding, Label, NearDuplicates, Overlap, RowFacts, row_facts, row_text
from tunesmith.recipe import QUALITY, SCREENING, DataSection, DuplicatesSection, RowKind, SourceSection, settled
from tunesmith.runs.decisions import Decisions
from tunesmith.stages.prepare.candidate import (
    READERS,
    Candidate,
    candidate_of,
    encoded,
    encoded_documents,
    prompt_of,
    prompts_of,
    with_messages,
)
from tunesmith.stages.prepare.files import intermediate_batch
from tunesmith.stages.prepare.overlong import fitted

#: Why a row is rejected, by the code of its problem, as `ledger.json` spells it.
REASONS = {code: name.removeprefix("data-") for code, name in CODES.items()}


@dataclass(frozen=True)
class Settings:
    """What a process needs to work on rows; small, and sent to each process once."""

    data: DataSection
    kind: RowKind
    model_folder: Path
    template_source: str | None
    common: frozenset[str]
    decisions: Decisions


@dataclass(frozen=True)
class Rejection:
    """A row left out: for its content, or `unused` because there are more good rows than requested."""

    where: str
    source: int
    reason: str
    detail: str
    unused: bool = False


@dataclass(frozen=True)
class Made:
    """What the parent must know about an encoded row; its ids are in the chunk's batch, in this order, in `pieces` rows."""

    where: str
    source: int
    pieces: int
    key: int  # 64 bits of the digest of the whole row
    prompt: str | None  # digest of the messages before the last answer, if anything is asked
    answer: str | None  # digest of the answer to it, if it is one to learn
    unwanted: bool  # whether its answer is judged undesirable
    label: str | None
    facts: RowFacts
    signature: np.ndarray | None
    findings: list[Finding]
    notes: tuple[str, ...]
    test_signature: np.ndarray | None = None  # for comparing with test rows, which have no rejected answer
    earlier: frozenset[str] = frozenset()  # like `prompt`, for its answers before the last one


@dataclass
class Chunk:
    """The result for a chunk of rows."""

    rows_in: Counter[int] = field(default_factory=Counter)  # by source
    formats: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # in tokens, before rows are made to fit
    overlong: Counter[str] = field(default_factory=Counter)
    rows_added: int = 0  # by splitting rows
    problems: list[tuple[int, Problem]] = field(default_factory=list)  # with the source index
    rejections: list[Rejection] = field(default_factory=list)
    findings: list[tuple[str, Finding]] = field(default_factory=list)  # of rejected rows
    made: list[Made] = field(default_factory=list)
    batch: pa.RecordBatch | None = None


@dataclass(frozen=True)
class _Checked:
    """A row that passed its checks, on its way to the tokenizer."""

    candidate: Candidate
    source: int
    label: str | None
    findings: list[Finding]


class Worker:
    """Works on chunks of rows; one per process. Raises ModelError if conversations have no usable template."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        data = settings.data
        self._parts = data.parts
        self._read = READERS[settings.kind]
        self._checker = Checker(data)
        self._quality = settled(data.quality, QUALITY)
        near = data.duplicates.threshold is not None and "near-duplicate" in self._quality
        self._near = NearDuplicates(data.duplicates.threshold or 1.0, data.duplicates.num_perm) if near else None
        self._near_tests = near_tests(data) if data.test_part else None
        self._overlap = Overlap(data.overlap)
        self._label = Label(data.balance.label) if data.balance.label else None
        self.tokenizer = load_tokenizer(settings.model_folder)
        documents, name = settings.kind == "document", str(settings.model_folder)
        self.encoder = DocumentEncoder(self.tokenizer) if documents else None
        self.template = None if documents else ChatTemplate(self.tokenizer, settings.template_source, name)

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> Chunk:
        """Work on a chunk of rows, each with its source index."""
        chunk = Chunk()
        checked = [made for source, row in rows if (made := self._checked(source, row, chunk)) is not None]
        results = self._encoded([each.candidate for each in checked])
        kept: list[Candidate] = []
        for each, result in zip(checked, results, strict=True):
            if isinstance(result, Problem):
                chunk.problems.append((each.source, result))
                continue
            chunk.lengths[result.length] += 1
            for row in self._fitting(result, each, chunk):
                kept.append(row)
                chunk.made.append(self._made(row, each))
        if kept:
            chunk.batch = intermediate_batch(kept, self._settings.kind)
        return chunk

    def _encoded(self, chunk: Sequence[Candidate]) -> Iterator[Candidate | Problem]:
        if self.encoder is not None:
            return encoded_documents(chunk, self.encoder, self._settings.data.max_length)
        if self.template is None:
            raise AssertionError("neither a chat template nor a document encoder")
        return encoded(chunk, self.template)

    def _checked(self, source: int, row: Row, chunk: Chunk) -> _Checked | None:
        """The row, read and cleaned; None if it has a problem or is rejected, which the chunk records."""
        chunk.rows_in[source] += 1
        value = self._settings.decisions.apply(row.value or {})
        if value is None:
            chunk.rejections.append(Rejection(row.where, source, "reviewed", "rejected in the review"))
            return None
        row = replace(row, value=dict(value))
        result = row.problem or read(row, self._parts[source], self._settings, chunk.formats)
        if isinstance(result, Problem):
            chunk.problems.append((source, result))
            return None
        candidate, findings = self._clean(result)
        rejecting = next((finding for finding in findings if finding.action == "reject"), None)
        if rejecting is not None:
            chunk.findings += [(row.where, finding) for finding in findings]
            chunk.rejections.append(Rejection(row.where, source, rejecting.rule, rejecting.detail))
            return None
        label = self._label(row.value or {}, candidate.messages) if self._label else None
        return _Checked(candidate, source, label, findings)

    def _clean(self, candidate: Candidate) -> tuple[Candidate, list[Finding]]:
        if candidate.text is not None:
            text, findings = self._checker.screen_text(candidate.text)
            return replace(candidate, text=text), [*findings, *self._overlaps(text)]
        messages, findings = self._checker.check(candidate.messages)
        if candidate.unwanted:
            findings = _of_bad_answers(findings)
        rejected = candidate.rejected
        if rejected is not None:
            rejected, more = self._checker.check(rejected)
            findings += [each for each in _of_bad_answers(more) if each not in findings]
        findings += self._overlaps("\n".join(_texts(messages)))
        return replace(with_messages(candidate, messages), rejected=rejected), findings

    def _overlaps(self, text: str) -> list[Finding]:
        action = self._quality.get("benchmark-overlap")
        if action is None:
            return []
        found = self._overlap.check(text)
        return [Finding("benchmark-overlap", action, f"{count} runs of {name}") for name, count in found.items()]

    def _fitting(self, row: Candidate, each: _Checked, chunk: Chunk) -> list[Candidate]:
        limit = self._settings.data.max_length
        if row.length <= limit or self.template is None:  # the pieces of a document fit
            return [row]
        fit = fitted(row, self.template, self._settings.data)
        chunk.overlong[fit.decision] += 1
        chunk.rows_added += len(fit.rows) + len(fit.lost) - 1
        detail = f"{row.length} tokens, data.max_length is {limit}"
        chunk.rejections += [Rejection(where, each.source, "too-long", detail) for where in fit.lost]
        return fit.rows

    def _made(self, row: Candidate, each: _Checked) -> Made:
        key, prompt, answer = digests(row)
        signature, tested = self._signature(row), self._near_tests is not None
        return Made(
            row.where,
            each.source,
            max(1, len(row.pieces)),
            key,
            prompt,
            answer,
            row.unwanted,
            each.label,
            RowFacts(0, None) if row.unwanted else row_facts(row.messages),
            signature,
            each.findings,
            self._notes(row),
            signature if signature is not None and compared_whole(row) else self.test_signature(row),
            frozenset(map(sha256_json, prompts_of(row.messages)[:-1])) if tested else frozenset(),
        )

    def _notes(self, row: Candidate) -> tuple[str, ...]:
        notes = {note for side in row.sides for note in side.notes}
        if len(row.pieces) > 1:
            notes.add("document-split")
        if self.encoder is not None and not self.encoder.ends:
            notes.add("no-end-of-document")
        return tuple(sorted(notes))

    def _signature(self, row: Candidate) -> np.ndarray | None:
        """The signature that finds near-duplicates; None if they are not looked for."""
        if self._near is None:
            return None
        both = [*row.messages, *(row.rejected[-1:] if row.rejected else [])]
        return self._near.signature(self._text(both, row))

    def test_signature(self, row: Candidate) -> np.ndarray | None:
        """The signature that finds near-copies of test rows, whatever is done to near-duplicates; None without a test set.

        It covers a pair's chosen conversation. For a prompt whose answers are sampled it covers the prompt, with or without a
        reference.
        """
        asked = row.more.prompt if isinstance(row.more, Asked) else row.messages
        return None if self._near_tests is None else self._near_tests.signature(self._text(asked, row))

    def _text(self, messages: Sequence[Message], row: Candidate) -> str:
        return row_text(messages, self._settings.common) if row.text is None else row.text

    def cleaned(self, row: Candidate) -> Candidate:
        """The row, cleaned as a train row would be, for comparison with train rows."""
        return self._clean(row)[0]


def compared_whole(row: Candidate) -> bool:
    """Whether a row's signature against test rows is the same as against other train rows."""
    return row.rejected is None and not isinstance(row.more, Asked)


def near_tests(data: DataSection) -> NearDuplicates:
    """An index of test rows, with a threshold even if `data.duplicates` has none."""
    threshold = data.duplicates.threshold or DuplicatesSection.model_fields["threshold"].default
    return NearDuplicates(threshold, data.duplicates.num_perm)


def read(row: Row, part: SourceSection, settings: Settings, formats: Counter[str]) -> Candidate | Problem:
    """What the objective learns from the row, read by its source's columns and format; counts the format."""
    value = mapped(row.value or {}, part.columns or {}, row.where) if part.columns else row.value or {}
    if isinstance(value, Problem):
        return value
    asked = part.format or "auto"
    made = READERS[settings.kind](value, row.where, asked, settings.data.system)
    if isinstance(made, Problem):
        return made
    documents = settings.kind == "document"
    formats["text" if documents else asked if asked != "auto" else _detected(value)] += 1
    return candidate_of(row.where, made)


def _detected(value: Mapping[str, Any]) -> str:
    if "chosen" in value:
        return f"preference {detected(value) or 'messages'}"
    return detected(value) or ("prompt" if "prompt" in value else "messages")


def _of_bad_answers(findings: Sequence[Finding]) -> list[Finding]:
    """For an answer that is meant to be bad, only the findings that were fixed and those about safety."""
    return [each for each in findings if each.action == "fix" or each.rule in SCREENING]


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages]


def digests(row: Candidate) -> tuple[int, str | None, str | None]:
    """64 bits of the whole row's digest, and the digests of its prompt and its answer; None if there is none to learn."""
    prompt = prompt_of(row)
    answer = row.messages[len(prompt) :] if prompt else row.messages
    learnt = bool(answer) and not row.unwanted
    key = int(row.key[:16], 16)
    return key, sha256_json(prompt) if prompt else None, sha256_json([answer, row.rejected]) if learnt else None
