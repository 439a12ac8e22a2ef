"""Sentences with one tag per word, in the column format of the CoNLL shared tasks.

A line holds a word and its columns, separated by blanks or tabs; the last column is the tag. An empty line ends a sentence.
Tags are `B-type`, `I-type` and `O`, and `S-` and `E-` as in IOBES. An `I-` without such an entity before it begins one (IOB1).
`-DOCSTART-` lines are skipped, and so are `#` lines before a sentence that do not end with a tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem
from tunesmith.io.compressed import lines_of, opened, too_long

#: The test set of WNUT 2017 is published with the last suffix.
SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".annotated")

LONGEST_SENTENCE = 1_000_000  # words; a longer sentence means a file without empty lines

_TAG = re.compile(r"O|[BIES]-\S+")

Read = tuple[str, Any, Problem | None]  # where, value, problem


def conll_rows(path: Path) -> Iterator[Read]:
    """One row per sentence, located at the line of its first word: `tokens`, `tags`, `text` (joined by blanks), `entities`.

    Entities are `{"type": ..., "text": ...}` in order. A line without a tag, or not in UTF-8, makes its sentence a problem.
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
    """A line's text, and what is wrong with it (None if nothing is)."""
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
    """The entities that the tags mark, in order, their words joined by blanks."""
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
    why = "a sentence that cannot be read cannot be trained on, and guessing would silently change your data"
    return Problem("TS116", f"not a CoNLL line: {detail}", where, why, "write a word, a tab and its tag, such as B-person or O")
