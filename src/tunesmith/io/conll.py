"""Sentences with a tag for each word, in the column format of the CoNLL shared tasks.

A line holds a word and, after blanks or tabs, its columns, of which the last is the tag; an empty line ends a sentence. Tags
are `B-type`, `I-type` and `O` (also with `S-` and `E-`, as IOBES has them); an `I-` with no such entity before it begins one
(IOB1). Lines of `-DOCSTART-`, and lines with `#` before a sentence that do not end with a tag, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem
from tunesmith.io.compressed import lines_of, opened, too_long

#: The last is how the test set of WNUT 2017 is published.
SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".annotated")

LONGEST_SENTENCE = 1_000_000  # words: more is a file without empty lines

_TAG = re.compile(r"O|[BIES]-\S+")

Read = tuple[str, Any, Problem | None]  # where, value, problem


def conll_rows(path: Path) -> Iterator[Read]:
    """A row for each sentence, at the line of its first word: `tokens`, `tags`, `text` (joined by blanks) and `entities`.

    Entities are `{"type": ..., "text": ...}` in order. A sentence with a line that has no tag, or is not UTF-8, is a problem.
    """
    words: list[list[str]] = []
    problem, begun, separator = None, 1, None
    with opened(path) as handle:
        for number, raw in enumerate(lines_of(handle), start=1):
            line, detail = _text(raw, number)
            if detail:
                problem = problem or _bad_line(f"{path}:{number}", detail)
            if not line.strip():
                yield from _sentence(f"{path}:{begun}", words, problem)
                words, problem = [], None
                continue
            begun = begun if words else number
            separator = separator or ("\t" if "\t" in line else None)
            columns = line.strip(" ").split(separator)
            if not words and (columns[0] == "-DOCSTART-" or (line.startswith("#") and not _TAG.fullmatch(columns[-1]))):
                continue
            if len(columns) < 2 or not columns[0]:
                problem = problem or _bad_line(f"{path}:{number}", "a word without a tag")
            if len(words) < LONGEST_SENTENCE:
                words.append([columns[0], columns[-1].strip()])
            else:
                problem = problem or _bad_line(f"{path}:{number}", f"a sentence of more than {LONGEST_SENTENCE:,} words")
    yield from _sentence(f"{path}:{begun}", words, problem)


def _text(raw: bytes | None, number: int) -> tuple[str, str | None]:
    """A line's text, or what is wrong with it."""
    if raw is None:
        return "?", f"a line of {too_long()}"
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n"), None
    except UnicodeDecodeError:
        return "?", "not UTF-8"


def _sentence(where: str, words: Sequence[Sequence[str]], problem: Problem | None) -> Iterator[Read]:
    if problem is not None:
        yield where, None, problem
    elif words:
        tokens, tags = [word for word, _ in words], [tag for _, tag in words]
        row = {"tokens": tokens, "tags": tags, "text": " ".join(tokens), "entities": entities(tokens, tags)}
        yield where, row, None


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[dict[str, str]]:
    """The entities that tags mark, in order, with their words joined by blanks."""
    found: list[tuple[str, list[str]]] = []
    goes_on = False
    for token, tag in zip(tokens, tags, strict=True):
        mark, _, kind = tag.partition("-")
        if mark not in ("B", "I", "E", "S"):
            goes_on = False
            continue
        if mark in ("I", "E") and goes_on and found[-1][0] == kind:
            found[-1][1].append(token)
        else:
            found.append((kind, [token]))
        goes_on = mark in ("B", "I")
    return [{"type": kind, "text": " ".join(words)} for kind, words in found]


def _bad_line(where: str, detail: str) -> Problem:
    why = "a sentence that cannot be read cannot be trained on, and guessing would change your data quietly"
    return Problem(
        "TS116", f"not a line of CoNLL: {detail}", where, why, "write a word, a tab and its tag, such as B-person or O"
    )
