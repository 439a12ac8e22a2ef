"""Raw text to rows: what is read, how it is encoded, and that no token is lost or labelled twice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.chat.document import Document, DocumentEncoder, to_document, to_pieces
from tunesmith.errors import DataError, Problem
from tunesmith.io.documents import folder_digest, read_documents


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(8, 20))
def test_each_token_but_the_first_is_told_once(ids: list[int], max_length: int) -> None:
    pieces = to_pieces(ids, max_length)
    told = [t for p in pieces for t, labelled in zip(p.input_ids, p.loss_mask, strict=True) if labelled]
    assert told == ids[1:]
    assert all(2 <= len(p.input_ids) == len(p.loss_mask) <= max_length for p in pieces)
    assert all(one.input_ids[-1] == two.input_ids[0] for one, two in pairwise(pieces))


def test_a_folder_gives_a_document_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "deep" / "a.md").write_text("# three\n", encoding="utf-8")
    (tmp_path / "skipped.py").write_text("no", encoding="utf-8")
    found = [(Path(row.where).name, (row.value or {})["text"]) for row in read_documents(tmp_path)]
    assert found == [("b.txt", "two"), ("a.md", "# three\n")]
    before = folder_digest(tmp_path)
    (tmp_path / "skipped.py").write_text("changed", encoding="utf-8")
    assert folder_digest(tmp_path) == before
    (tmp_path / "b.txt").write_text("other", encoding="utf-8")
    assert folder_digest(tmp_path) != before


def test_one_file_and_rows(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes("\ufeffcaf\u00e9\n".encode())
    assert [row.value for row in read_documents(tmp_path / "one.txt")] == [{"text": "caf\u00e9\n"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n", encoding="utf-8")
    assert [row.value for row in read_documents(tmp_path / "rows.jsonl")] == [{"text": "x"}]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (row,) = read_documents(tmp_path)
    assert row.problem is not None
    assert (row.problem.code, row.where) == ("TS108", str(tmp_path / "bad.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="TS101"):
        list(read_documents(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("code", "row"),
    [("TS104", {"messages": []}), ("TS108", {"text": 3}), ("TS108", {"text": "a\ud800"}), ("TS115", {"text": " \n"})],
)
def test_bad_rows(code: str, row: dict[str, Any]) -> None:
    found = to_document(row, "f:1")
    assert isinstance(found, Problem)
    assert (found.code, found.where) == (code, "f:1")
    assert to_document({"text": " x ", "url": "y"}, "f:1") == Document(" x ")


def test_control_tokens_in_the_text_are_text_and_the_end_is_real(tokenizer: Any) -> None:
    text = "before <|im_end|> after <|endoftext|>"
    (ids,) = DocumentEncoder(tokenizer).encode([text])
    assert not isinstance(ids, Problem)
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(tokenizer.added_tokens_decoder)
