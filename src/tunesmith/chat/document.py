"""Documents to token ids for continued pre-training: every token carries loss, and long documents are split into pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tunesmith.chat.template import Encoded, control_cuts, control_pattern
from tunesmith.errors import Problem


@dataclass(frozen=True)
class Document:
    """A raw text to train on."""

    text: str


def to_document(row: Mapping[str, Any], where: str, *_: Any) -> Document | Problem:
    """The document of a row `{"text": ...}`, or the Problem of the row; other columns are ignored."""
    text = row.get("text")
    if "text" not in row:
        why = "objective: pretrain trains only on the column 'text'"
        fix = 'write each row as {"text": ...}, or train on conversations with objective: sft'
        return Problem("TS104", f"no column 'text', found {', '.join(map(repr, row)) or 'none'}", where, why, fix)
    if not isinstance(text, str):
        why = "only text can be trained on"
        return Problem("TS108", f"'text' is {type(text).__name__}, not a string", where, why, "correct the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Problem("TS108", "half of a surrogate pair in the text", where, "it cannot be tokenized", "repair the text")
    if not text.strip():
        return Problem("TS115", "the document is empty", where, "there is nothing to train on", "delete it")
    return Document(text)


class DocumentEncoder:
    """Encodes documents with a tokenizer: its bos if it adds one, the text, its eos.

    Text that spells a control token is encoded as plain text, so that bos and eos are the only control ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._control = control_pattern(tokenizer)
        probe = tokenizer("Hi", add_special_tokens=False)["input_ids"]
        self._prefixes_space = tokenizer.convert_ids_to_tokens(probe)[0].startswith("\u2581")
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._before = [bos] if bos is not None and tokenizer("Hi")["input_ids"][0] == bos else []
        self._after = [] if eos is None else [eos]

    @property
    def ends(self) -> bool:
        """Whether documents end with an eos."""
        return bool(self._after)

    def encode(self, texts: Sequence[str]) -> list[list[int] | Problem]:
        """The ids of each document, or the Problem that prevents encoding it. The tokenizer is called once for all."""
        parts = [self._parts(text) for text in texts]
        flat = [part for each in parts if not isinstance(each, Problem) for part in each]
        ids = iter(self.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"] if flat else ())
        return [each if isinstance(each, Problem) else self._whole([next(ids) for _ in each]) for each in parts]

    def _whole(self, parts: Sequence[Sequence[int]]) -> list[int] | Problem:
        """The parts between bos and eos; a Problem if the result has no token with a predecessor to predict it from."""
        ids = [*self._before, *(token for part in parts for token in part), *self._after]
        if len(ids) > 1:
            return ids
        why = "there is no token before it to predict it from, and the tokenizer adds neither bos nor eos"
        return Problem("TS115", "the document is a single token", "", why, "merge it with another document")

    def _parts(self, text: str) -> list[str] | Problem:
        """The text, cut inside each control token that it spells."""
        cuts = control_cuts(self._control, text)
        if cuts and self._prefixes_space:
            why = "this tokenizer cannot distinguish them from real ones: they would end the document, or forge a turn"
            return Problem("TS108", "control tokens written out inside the text", "", why, "remove them from the document")
        return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def to_pieces(ids: Sequence[int], max_length: int) -> list[Encoded]:
    """A document of at least two ids as rows of at most `max_length`; each id except the first carries loss exactly once.

    A piece begins with the last id of the previous piece, from which its next id is predicted. The repeated id carries no loss.
    """
    step = max_length - 1
    parts = [list(ids[start : start + max_length]) for start in range(0, len(ids) - 1, step)]
    return [Encoded(part, [False] + [True] * (len(part) - 1)) for part in parts]
