"""Near-duplicates, conflicts, overlap with benchmarks, and class balance."""

from __future__ import annotations

import json
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from tunesmith.errors import DataError, RecipeError
from tunesmith.quality import Conflicts, Label, NearDuplicates, Overlap, balance, common_segments, duplicates, row_text
from tunesmith.quality.duplicates import RUN, choose_bands
from tunesmith.quality.words import words
from tunesmith.recipe import BalanceSection, OverlapSection

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ala", "eno", "iru", "oso", "uta", "aki")]


def jaccard(one: str, other: str) -> float:
    """Jaccard index of the sets of word runs, implemented independently: the reference for `signature`."""

    def runs(text: str) -> set[tuple[str, ...]]:
        padded = ["<"] * (RUN - 1) + words(text) + [">"] * (RUN - 1)
        return {tuple(padded[i : i + RUN]) for i in range(len(padded) - RUN + 1)}

    first, second = runs(one), runs(other)
    return len(first & second) / len(first | second)


def near(text: str, draw: random.Random) -> str:
    """The text with words changed until the Jaccard index would fall below 0.8."""
    changed = text
    while True:
        parts = changed.split()
        parts[draw.randrange(len(parts))] = draw.choice(WORDS)
        if jaccard(text, " ".join(parts)) < 0.8:
            return changed
        changed = " ".join(parts)


def test_planted_duplicates_are_found_and_others_are_not() -> None:
    draw = random.Random(1)
    originals = [" ".join(draw.choices(WORDS, k=draw.randint(40, 90))) for _ in range(600)]
    near_ones = [near(text, draw) for text in originals[:200]]
    index = NearDuplicates(0.8, 128)
    found = [index.add(str(i), index.signature(text)) for i, text in enumerate(originals)]
    assert found == [None] * 600
    assert [index.add("copy", index.signature(text)) for text in originals] == [str(i) for i in range(600)]
    hits = [index.add("near", index.signature(text)) for text in near_ones]
    assert sum(hit == str(i) for i, hit in enumerate(hits)) >= 190
    assert len(index) == 600 + hits.count(None)


def test_the_threshold_decides_exactly_for_texts_of_ordinary_length() -> None:
    draw = random.Random(2)
    text = " ".join(draw.choices(WORDS, k=60))
    other = near(text, draw)
    exact = jaccard(text, other)
    for threshold, expected in ((exact - 0.001, "a"), (exact + 0.001, None)):
        index = NearDuplicates(threshold, 512)
        index.add("a", index.signature(text))
        assert index.add("b", index.signature(other)) == expected


@pytest.mark.parametrize(
    "text", ["hi", "ok", "", "\U0001f600", "\u4f60\u597d\uff0c\u4eca\u5929\u5929\u6c14", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"]
)
def test_short_texts_and_scripts_without_spaces(text: str) -> None:
    index = NearDuplicates()
    assert index.add("a", index.signature(text)) is None
    assert index.add("b", index.signature(text + "!")) == "a"
    assert index.add("c", index.signature("something else, of several words")) is None


def test_chinese_that_differs_in_one_character_of_thirty_is_near() -> None:
    text = (
        "\u6211\u4eec\u660e\u5929\u65e9\u4e0a\u4e5d\u70b9\u5728\u5b66\u6821\u95e8\u53e3\u96c6\u5408"
        "\u7136\u540e\u4e00\u8d77\u5750\u8f66\u53bb\u535a\u7269\u9986\u53c2\u89c2\u65b0\u5c55\u89c8"
    )
    index = NearDuplicates(0.7)
    index.add("a", index.signature(text))
    assert index.add("b", index.signature(text.replace("\u4e5d", "\u516b"))) == "a"


def test_many_rows_of_one_band_are_all_kept_apart() -> None:
    index = NearDuplicates(0.9)
    texts = [
        "the same long beginning of every single row that we have in this set here " * 2 + f"number {i} of {i * 7}"
        for i in range(300)
    ]
    assert [index.add(str(i), index.signature(text)) for i, text in enumerate(texts)].count(None) > 1
    assert all(index.add("x", index.signature(text)) is not None for text in texts)


def test_nothing_is_lost_when_the_index_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_FIRST", 8)
    index = NearDuplicates()
    signatures = [index.signature(" ".join(random.Random(i).choices(WORDS, k=20))) for i in range(300)]
    assert [index.add(str(i), signature) for i, signature in enumerate(signatures)] == [None] * 300
    assert [index.add("x", signature) for signature in signatures] == [str(i) for i in range(300)]


def test_bands_find_a_pair_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        bands = choose_bands(threshold, 128)
        assert bands.chance(threshold) >= 0.98
        assert bands.count * bands.rows <= 128


def test_a_shared_instruction_does_not_make_rows_alike() -> None:
    instruction = "Read the ticket below with care and answer with the name of the team that must look at it. Use one word."
    rows = [
        [
            {"role": "user", "content": f"{instruction}\n{' '.join(random.Random(i).choices(WORDS, k=6))}"},
            {"role": "assistant", "content": "billing"},
        ]
        for i in range(60)
    ]
    common = common_segments(rows)
    assert common == {
        "Read the ticket below with care and answer with the name of the team that must look at it.",
        "Use one word.",
        "billing",
    }
    index = NearDuplicates(0.5)
    assert [index.add(str(i), index.signature(row_text(row, common))) for i, row in enumerate(rows)] == [None] * 60
    plain = NearDuplicates(0.5)
    assert any(plain.add(str(i), plain.signature(row_text(row))) is not None for i, row in enumerate(rows))


def test_conflicting_answers_to_one_prompt() -> None:
    conflicts = Conflicts()
    for number, prompt, answer in ((1, "p", "a"), (2, "q", "a"), (3, "p", "b"), (4, "p", "a"), (5, "q", "a")):
        conflicts.add(number, sha256(prompt.encode()).hexdigest(), sha256(answer.encode()).hexdigest())
    (conflict,) = conflicts.report()
    assert (conflict.numbers, conflict.rows) == ((1, 3), 3)
    assert Conflicts().report() == []


def test_overlap_counts_runs_of_13_words(tmp_path: Path) -> None:
    question = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": question}) + "\n" + json.dumps({"question": "Too short."}) + "\n", encoding="utf-8")
    overlap = Overlap(OverlapSection(gsm8k=str(path)))
    assert (overlap.items, overlap.too_short) == ({"gsm8k": 2}, {"gsm8k": 1})
    assert overlap.check("Q: " + question.upper().replace(",", ";")) == {"gsm8k": len(words(question)) - 12}
    assert overlap.check(" ".join(question.split()[:12])) == {}
    assert Overlap(OverlapSection()).check(question) == {}
    with pytest.raises(DataError, match="no such benchmark file"):
        Overlap(OverlapSection(humaneval=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("data", "items"),
    [
        ("small_data", {"mmlu": 40, "gsm8k": 20, "humaneval": 20}),
        ("shared_data", {"mmlu": 14042, "gsm8k": 1319, "humaneval": 164}),
    ],
)
def test_overlap_with_files_of_each_format(request: pytest.FixtureRequest, data: str, items: dict[str, int]) -> None:
    folder = request.getfixturevalue(data)
    files = OverlapSection(
        mmlu=str(folder / "mmlu"),
        gsm8k=str(folder / "gsm8k/test.jsonl"),
        humaneval=str(folder / "humaneval/HumanEval.jsonl.gz"),
    )
    overlap = Overlap(files)
    assert overlap.items == items
    first = json.loads((folder / "gsm8k/test.jsonl").read_text(encoding="utf-8").split("\n")[0])["question"]
    assert set(overlap.check(f"Solve this: {first}")) == {"gsm8k"}


def test_balance_by_cap_and_ratio() -> None:
    labels = ["a"] * 50 + ["b"] * 10 + [None] * 3 + ["c"] * 5
    for section, sizes in (
        (BalanceSection(cap=8), {"a": 8, "b": 8, "c": 5, None: 3}),
        (BalanceSection(ratio=3), {"a": 15, "b": 10, "c": 5, None: 3}),
        (BalanceSection(cap=7, ratio=2), {"a": 7, "b": 7, "c": 5, None: 3}),
        (BalanceSection(), {"a": 50, "b": 10, "c": 5, None: 3}),
    ):
        kept = balance(labels, section, 1)
        assert kept == sorted(kept) == balance(labels, section, 1)
        assert Counter(labels[i] for i in kept) == sizes
    assert balance(labels, BalanceSection(cap=8), 2) != balance(labels, BalanceSection(cap=8), 1)


def test_label_by_column_or_expression() -> None:
    row, messages = {"intent": "pay", "a b": 1}, [{"role": "assistant", "content": '{"intent": "refund"}'}]
    assert Label("intent")(row, messages) == "pay"
    assert Label("answer_json.intent")(row, messages) == "refund"
    assert Label("row['a b'] + 1")(row, messages) == "2"
    assert Label("missing")(row, messages) is None
    assert Label("1 / 0")(row, messages) is None
    with pytest.raises(RecipeError, match="not a valid expression"):
        Label("a +")
