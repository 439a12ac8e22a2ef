"""`prepare`'s output against independent references: brute-force Jaccard, transformers' templates, NumPy, counts by hand."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import chat_row, random_llama
from tests.support.prepared import read_arrow
from tests.support.tokenizers import VOCABULARY, small_tokenizer
from tunesmith.errors import DataError, RecipeError
from tunesmith.quality import Label, RowFacts, balance
from tunesmith.recipe import BalanceSection, DataSection, parse_recipe
from tunesmith.runs import create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.prepare.ledger import length_facts
from tunesmith.stages.prepare.whole import HELDOUT, OUT, TRAIN, WholeSet
from tunesmith.stages.prepare.work import Made, Rejection

Row = dict[str, Any]
Words = list[str]

THRESHOLD = 0.8  # the default of `data.duplicates.threshold`
BELOW, ABOVE = 0.78, 0.85  # no texts in between: MinHash may miss one pair in fifty right at the threshold


@dataclass(frozen=True)
class Prepared:
    """A run's output, read without the stage's code."""

    folder: Path
    ledger: dict[str, Any]
    train: list[Row]
    heldout: list[Row]
    rejects: list[Row]
    unused: list[Row]

    def lines(self, name: str = "train") -> list[int]:
        """Line numbers in train.jsonl of the rows in one of the sets."""
        return sorted(line_of(row["where"]) for row in getattr(self, name))

    def rejected(self, reason: str) -> list[int]:
        return sorted(line_of(row["where"]) for row in self.rejects if row["reason"] == reason)


Prepare = Callable[..., Prepared]


def line_of(where: str) -> int:
    found = re.search(r":(\d+)(#\d+| \(piece \d+ of \d+\))?$", where)
    assert found is not None
    return int(found.group(1))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    return random_llama(
        folder, tokenizer, hidden_size=16, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=1024
    )


@pytest.fixture
def prepared(tmp_path: Path, small_model: Path) -> Prepare:
    """Writes rows, prepares them, and reads the result. `data` and `more` are recipe text."""

    def make(files: dict[str, Iterable[Row | str]], data: str, more: str = "") -> Prepared:
        for name, rows in files.items():
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        own = "" if "sources:" in data else "train: train.jsonl, "
        test = "test: test.jsonl, " if "test.jsonl" in files else ""
        text = f"model: {small_model}\n{more}\ndata: {{{own}{test}{data}}}\n"
        count = len(list(tmp_path.glob("run-*")))
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / f"run-{count}")
        ledger = prepare(run)
        folder = run.path / "data"
        sets = [read_arrow(folder / f"{name}.arrow") for name in ("train", "heldout")]
        return Prepared(folder, ledger, *sets, *(read_jsonl(folder / f"{name}.jsonl") for name in ("rejects", "unused")))

    return make


def drawn(draw: random.Random, count: int) -> Words:
    return draw.choices(VOCABULARY, k=count)


def spoken(row: Row) -> str:
    """The text of all turns of a row except the system turn."""
    if "text" in row:
        return str(row["text"])
    return " ".join(turn["content"] for turn in row["messages"] if turn["role"] != "system")


def runs_of(text: str) -> frozenset[tuple[str, ...]]:
    """The set of three-word runs of a text whose ends count as two words each (docs/data.md)."""
    padded = ["^", "^", *re.findall(r"\w+", text.lower()), "$", "$"]
    return frozenset(tuple(padded[i : i + 3]) for i in range(len(padded) - 2))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    index = len(one & other) / len(one | other)
    assert not BELOW < index < ABOVE, "the test made a pair too near the threshold"
    return index


def edits(question: Words, answer: Words, draw: random.Random) -> list[tuple[Words, Words, str]]:
    """Question, answer and system of train rows made from a test row: near ones in each direction, and far ones."""
    system = "Answer in one word."
    changed = [*question[:20], "changed", *question[21:]]
    return [
        (changed, answer, system),
        (changed, [*answer[:30], "changed", *answer[31:]], system),
        ([*question, *drawn(draw, 7)], answer, system),
        (["so", *question], [*answer, *drawn(draw, 6)], system),
        ([*drawn(draw, 7), *question], answer, system),
        (question[7:], answer, system),
        (question[1:], answer[:-6], system),
        ([*question, answer[0]], answer[1:], system),  # the same words, one of them by another speaker
        (question, answer, "Another system turn."),
        (["so", *question], drawn(draw, 50), system),  # far: another answer
        (drawn(draw, 50), answer, system),  # far: another question
        (question[::2], answer[::2], system),  # far: every second word
    ]


def conversation(question: Words, answer: Words, system: str = "Answer in one word.") -> Row:
    return chat_row(" ".join(question), " ".join(answer), system)


def turns(*contents: str) -> Row:
    """A conversation that starts with a user turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize(("objective", "action"), [("sft", "reject"), ("sft", "warn"), ("kto", "warn")])
def test_no_row_nearly_the_same_as_a_test_row_is_trained_on(prepared: Prepare, objective: str, action: str) -> None:
    """Each train row is compared with each test row and each earlier train row by its exact Jaccard index.

    For `kto` each row occurs as a desirable and as an undesirable answer: both leak, but they are not near-duplicates.
    """
    draw = random.Random(1)
    asked = [(drawn(draw, 50), drawn(draw, 50)) for _ in range(5)]
    made = [edit for question, answer in asked for edit in edits(question, answer, draw)]
    draw.shuffle(made)
    # Near the test row, and near a train row that is not: the row leaks, whichever is found first.
    question, answer = asked[0]
    longer = [*question, *drawn(draw, 11)]
    made = [(longer[11:], answer, "System."), (longer, answer, "System."), *made]
    # Near only each other.
    alone = drawn(draw, 50), drawn(draw, 50)
    made += [(*alone, "System."), (["so", *alone[0]], alone[1], "System.")]
    labels = (True, False) if objective == "kto" else (None,)
    rows = [(conversation(*each), label) for each in made for label in labels]
    tests = [conversation(*each) for each in asked]
    done = prepared(
        {"train.jsonl": [row | ({} if label is None else {"label": label}) for row, label in rows], "test.jsonl": tests},
        f"heldout: 0, quality: {{near-duplicate: {action}}}",
        f"objective: {objective}",
    )
    test_runs = [runs_of(spoken(test)) for test in tests]
    leaks, near, kept = [], [], []
    remembered: list[tuple[frozenset[tuple[str, ...]], bool | None]] = []
    for line, (row, label) in enumerate(rows, start=1):
        runs = runs_of(spoken(row))
        if max(jaccard(runs, test) for test in test_runs) >= THRESHOLD:
            leaks.append(line)
        elif any(same == label and jaccard(runs, other) >= THRESHOLD for other, same in remembered):
            near.append(line)
        else:
            remembered.append((runs, label))
            kept.append(line)
    assert len(leaks) == (5 * 9 + 1) * len(labels)
    assert len(near) == len(labels)
    assert done.rejected("leaks-test") == leaks
    assert done.lines() == sorted([*kept, *(near if action == "warn" else [])])
    assert done.ledger["findings"]["near-duplicate"] == {action: len(near)}
    assert done.ledger["test"]["rows_test"] == len(tests)


def test_test_rows_that_are_near_each_other_all_count(prepared: Prepare) -> None:
    draw = random.Random(2)
    core = drawn(draw, 60)
    tests = [conversation(drawn(draw, 2), [*core, *drawn(draw, 2)]) for _ in range(20)]
    rows = [chat_row(f"{turns[1]['content']} now", turns[2]["content"]) for turns in (test["messages"] for test in tests)]
    others = [conversation(drawn(draw, 12), drawn(draw, 12)) for _ in range(3)]
    assert all(jaccard(runs_of(spoken(a)), runs_of(spoken(b))) >= THRESHOLD for a, b in zip(rows, tests, strict=True))
    done = prepared({"train.jsonl": [*others, *rows], "test.jsonl": tests}, "heldout: 0, quality: {near-duplicate: warn}")
    assert done.lines() == [1, 2, 3]


def test_a_pair_whose_chosen_side_is_nearly_a_test_row_is_not_trained_on(prepared: Prepare) -> None:
    draw = random.Random(3)
    names = ("prompt", "chosen", "rejected")
    pairs = [dict(zip(names, (" ".join(drawn(draw, 40)) for _ in names), strict=True)) for _ in range(4)]
    test = {"messages": conversation(pairs[3]["prompt"].split()[1:], pairs[3]["chosen"].split())["messages"][1:]}
    done = prepared({"train.jsonl": pairs, "test.jsonl": [test]}, "heldout: 0", "objective: dpo")
    assert done.lines() == [1, 2, 3]


def test_rows_equal_to_a_test_row_or_asking_the_same_are_left_out_without_near_duplicates(prepared: Prepare) -> None:
    """Both sides are compared after cleaning, whichever of them needs it."""

    def told(text: str) -> Row:
        return {"messages": [{"role": "assistant", "content": text}]}

    tests = [
        turns("Who wrote it?", "Anna."),
        turns("First question here?", "First answer.", "Second question here?", "Second answer."),
        told("Nobody asked for this one."),  # no prompt: only the whole row can match
        turns("Where is the cafe\u0301 of the town?", "In the old street."),  # decomposed Unicode
        turns("What is left over at night?", "Bread."),
    ]
    leaks = [
        turns("Who wrote it?", "Bert, in his later years."),
        turns("First question here?", "First answer.", "Second question here?", "Quite another one."),
        told("Nobody asked for this one."),
        turns("Where is the caf\u00e9 of the town?", "By the river."),
        turns("What is left \u200bover at night?  ", "Tea."),
    ]
    others = [
        turns("Who read it?", "Anna."),
        turns("First question here?", "Another first answer.", "Second question here?", "Second answer."),
        told("Nobody asked for that one."),
    ]
    done = prepared({"train.jsonl": [*leaks, *others], "test.jsonl": tests}, "heldout: 0, duplicates: {threshold: null}")
    assert done.rejected("leaks-test") == [1, 2, 3, 4, 5]
    assert done.lines() == [6, 7, 8]


@pytest.mark.parametrize("section", ["quality: {near-duplicate: 'off'}", "duplicates: {threshold: null}"])
def test_a_row_near_a_test_row_leaks_also_where_near_rows_are_let_be(prepared: Prepare, section: str) -> None:
    draw = random.Random(14)
    questions = [drawn(draw, 50) for _ in range(2)]
    answers = [drawn(draw, 50) for _ in range(2)]
    near = [conversation(["so", *questions[n]], answers[n]) for n in range(2)]
    rows = [
        near[0],
        near[1],
        conversation(["and", *questions[1]], answers[1]),
        conversation(questions[0][::2], answers[0][::2]),
    ]
    done = prepared({"train.jsonl": rows, "test.jsonl": [conversation(questions[0], answers[0])]}, f"heldout: 0, {section}")
    assert done.rejected("leaks-test") == [1]
    assert done.lines() == [2, 3, 4]


def test_a_prompt_near_a_test_rows_prompt_leaks_with_and_without_a_reference(prepared: Prepare) -> None:
    draw = random.Random(15)
    questions = [" ".join(drawn(draw, 50)) for _ in range(2)]
    long_answer = " ".join(drawn(draw, 200))
    rows = [
        {"prompt": f"so {questions[0]}"},
        {"prompt": f"and {questions[0]}", "answer": "another answer"},
        {"prompt": questions[1], "answer": long_answer},  # shares only the answer with the test row
    ]
    tests = [{"prompt": questions[0], "answer": long_answer}]
    grpo = "objective: grpo\ngrpo: {reward_funcs: ['length:1-9']}"
    done = prepared({"train.jsonl": rows, "test.jsonl": tests}, "heldout: 0", grpo)
    assert done.rejected("leaks-test") == [1, 2]
    assert done.lines() == [3]


def test_a_test_prompt_in_an_earlier_turn_leaks(prepared: Prepare) -> None:
    tests = [turns("Who wrote it?", "Anna."), turns("First here?", "One.", "Second here?", "Two.")]
    rows = [
        turns("Who wrote it?", "Anna.", "When was that, do you know?", "Last year, in the autumn."),
        turns("First here?", "One.", "Second here?", "Three.", "And what of the third one?", "Nothing is known of it."),
        turns("First here?", "One.", "Another second question?", "Two hundred, and some more."),
        turns("Before all that, who came?", "Nobody came.", "Who wrote it?", "Anna, they say."),  # asked after another turn
        turns("Who wrote it?", "Somebody else.", "In what year?", "In May.", "Which?", "Ten years ago.", "So?", "So it is."),
    ]
    done = prepared({"train.jsonl": rows, "test.jsonl": tests}, "heldout: 0")
    assert done.rejected("leaks-test") == [1, 2, 5]
    assert done.lines() == [3, 4]


def test_a_window_of_a_split_conversation_that_is_a_test_row_is_left_out(prepared: Prepare) -> None:
    draw = random.Random(4)
    rounds = [(" ".join(drawn(draw, 12)), " ".join(drawn(draw, 12))) for _ in range(3)]
    whole = [turn for question, answer in rounds for turn in chat_row(question, answer)["messages"][1:]]
    done = prepared(
        {"train.jsonl": [{"messages": whole}], "test.jsonl": [{"messages": whole[2:4]}]},
        "heldout: 0, overlong: split, max_length: 60",
    )
    assert [row["where"].partition("#")[2] for row in done.train] == ["1", "3"]
    assert [(row["where"].partition("#")[2], row["reason"]) for row in done.rejects] == [("2", "leaks-test")]


def test_no_document_nearly_the_same_as_a_test_document_is_trained_on(prepared: Prepare) -> None:
    draw = random.Random(5)
    tests = [{"text": " ".join(drawn(draw, 300))} for _ in range(3)]
    texts = [test["text"].split() for test in tests]
    rows = [
        {"text": " ".join(words)}
        for words in (
            texts[0],
            [*texts[0][:100], "changed", *texts[0][101:]],
            [*drawn(draw, 20), *texts[1]],
            texts[2][:-20],
            texts[2][:150],
            drawn(draw, 300),
        )
    ]
    done = prepared({"train.jsonl": rows, "test.jsonl": tests}, "heldout: 0, max_length: 128", "objective: pretrain")
    near = [max(jaccard(runs_of(spoken(row)), runs_of(spoken(test))) for test in tests) >= THRESHOLD for row in rows]
    assert near == [True, True, True, True, False, False]
    assert set(done.lines()) == {5, 6}
    assert done.rejected("leaks-test") == [1, 2, 3, 4]


def test_a_prompt_that_is_held_out_is_not_trained_on(prepared: Prepare) -> None:
    """Of prompts that occur three times each, by name; rows whose prompt is not held out all stay."""
    draw = random.Random(6)
    prompts = [" ".join(drawn(draw, 8)) for _ in range(20)]
    asked = [prompt for prompt in prompts for _ in range(3)]
    draw.shuffle(asked)
    rows = [chat_row(prompt, f"answer number {i}") for i, prompt in enumerate(asked)]
    drawn_lines = []
    for seed in (1, 2):
        done = prepared({"train.jsonl": rows}, "heldout: 0.15, duplicates: {threshold: null}", f"seed: {seed}")
        held = {asked[line - 1] for line in done.lines("heldout")}
        assert len(done.heldout) == 9  # 0.15 of 60
        assert held.isdisjoint(asked[line - 1] for line in done.lines())
        told = [row["messages"][1]["content"] for row in read_jsonl(done.folder / "heldout.jsonl")]
        assert sorted(told) == sorted(asked[line - 1] for line in done.lines("heldout"))
        left = [line for line, prompt in enumerate(asked, start=1) if prompt in held and line not in done.lines("heldout")]
        assert done.rejected("leaks-heldout") == left
        assert done.lines() == [line for line, prompt in enumerate(asked, start=1) if prompt not in held]
        drawn_lines.append(done.lines("heldout"))
    assert drawn_lines[0] != drawn_lines[1]


def test_a_prompt_that_is_held_out_is_not_trained_on_by_its_bad_answers(prepared: Prepare) -> None:
    """`kto` rows with undesirable answers share the prompt too."""
    rows = [
        {"prompt": f"question {number}", "completion": f"{'good' if label else 'bad'} {number}", "label": label}
        for number in range(20)
        for label in (True, False)
    ]
    done = prepared({"train.jsonl": rows}, "heldout: 0.2, duplicates: {threshold: null}", "objective: kto")
    held = {(line - 1) // 2 for line in done.lines("heldout")}
    assert len(held) >= 4
    assert not held & {(line - 1) // 2 for line in done.lines()}
    assert len(done.rejected("leaks-heldout")) == 2 * len(held) - len(done.lines("heldout")) > 0


def made_row(number: int, prompt: str | None) -> Made:
    digest = None if prompt is None else sha256(prompt.encode()).hexdigest()
    answer = sha256(str(number).encode()).hexdigest()
    key, facts = int(answer[:16], 16), RowFacts(0, None)
    return Made(f"t.jsonl:{number + 1}", 0, 1, key, digest, answer, False, None, facts, None, [], ())


def settled_splits(prompts: Sequence[str | None], seed: int, share: float) -> tuple[list[int], list[int]]:
    """The splits of rows with these prompts, and the indices of those rejected as leaks."""
    rejected: list[Rejection] = []
    whole = WholeSet(DataSection(train="t.jsonl"), seed, lambda _where, _finding: None, rejected.append)
    for number, prompt in enumerate(prompts):
        whole.add(made_row(number, prompt))
    whole.settle(share)
    assert {each.reason for each in rejected} <= {"leaks-heldout"}
    return list(whole.splits), [line_of(each.where) - 1 for each in rejected]


def test_the_draw_of_held_out_rows_over_many_seeds() -> None:
    """As many as requested, no more; no prompt in both splits; rows without a prompt are never rejected as leaks."""
    draws = set()
    for seed in range(40):
        draw = random.Random(seed)
        prompts = [draw.choice([None, *VOCABULARY[:12]]) for _ in range(30)]
        share = draw.choice([0.01, 0.1, 0.3, 0.55])
        splits, leaks = settled_splits(prompts, seed, share)
        held = [number for number, split in enumerate(splits) if split == HELDOUT]
        assert len(held) == {0.01: 1, 0.1: 3, 0.3: 9, 0.55: 16}[share]  # rounded half to even, at least one
        asked = {prompts[number] for number in held} - {None}
        expected = [i for i, prompt in enumerate(prompts) if i not in held and prompt in asked]
        assert leaks == expected == [number for number, split in enumerate(splits) if split == OUT]
        assert (splits, leaks) == settled_splits(prompts, seed, share)
        draws.add(tuple(number for number, split in enumerate(settled_splits(["a"] * 30, seed, 0.1)[0]) if split == HELDOUT))
    assert len(draws) > 35  # of 40 seeds
    assert settled_splits([None, None], 1, 0.9)[0].count(TRAIN) == 1  # one always stays in train
    assert settled_splits([None], 1, 0.9)[0] == [TRAIN]
    assert settled_splits([None] * 9, 1, 0.0)[0] == [TRAIN] * 9


def counted(rows: Sequence[Row], path: str) -> int:
    return sum(row["where"].startswith(f"{path}:") for row in rows)


def rendered(tokenizer: Any, messages: Sequence[Row], *, prompt: bool = False) -> list[int]:
    """The ids of a conversation from transformers."""
    ids: list[int] = tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, return_dict=False)
    return ids


def by_numpy(lengths: Sequence[int]) -> dict[str, Any]:
    """The ledger's `lengths`: nearest-rank quantiles, and bins up to each power of two from 8 on."""
    last = max(3, math.ceil(math.log2(max(lengths))))
    edges = [2**power for power in range(3, last + 1)]
    counts = np.bincount(np.digitize(lengths, edges, right=True), minlength=len(edges))
    quantiles = {f"{q} %": int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 95, 99, 100)}
    return {"quantiles": quantiles, "histogram": {str(edge): int(count) for edge, count in zip(edges, counts, strict=True)}}


@pytest.mark.parametrize("seed", range(6))
def test_quantiles_and_histogram_of_lengths(seed: int) -> None:
    draw = random.Random(seed)
    edges = [1, 7, 8, 9, 15, 16, 17, 64, 65, 128]
    for size in (1, 2, 3, 10, 20, 100, 333):
        lengths = [draw.choice(edges) if draw.random() < 0.5 else draw.randint(1, 200) for _ in range(size)]
        assert length_facts(Counter(lengths)) == by_numpy(lengths)
    assert length_facts(Counter(range(1, 101))) == {
        "quantiles": {"50 %": 50, "90 %": 90, "95 %": 95, "99 %": 99, "100 %": 100},
        "histogram": {"8": 8, "16": 8, "32": 16, "64": 32, "128": 36},
    }
    assert length_facts(Counter({5: 2, 9: 2})) == {
        "quantiles": {"50 %": 5, "90 %": 9, "95 %": 9, "99 %": 9, "100 %": 9},
        "histogram": {"8": 2, "16": 2},
    }


def busy_files(draw: random.Random) -> dict[str, list[Row | str]]:
    """Two sources and a test set whose rows end in every split that the ledger counts."""

    def row(kind: str) -> Row:
        return conversation(drawn(draw, draw.randint(8, 30)), [kind, *drawn(draw, draw.randint(8, 20))])

    first: list[Row | str] = [row("often" if i % 4 else "seldom") for i in range(60)]
    second: list[Row | str] = [
        {"prompt": " ".join(drawn(draw, 10)), "completion": " ".join(["often", *drawn(draw, 10)])} for _ in range(50)
    ]
    test = row("often")
    turns = [turn for _ in range(8) for turn in row("often")["messages"][1:]]
    plain = [each for each in first if isinstance(each, dict)]
    near = chat_row(f"so {plain[7]['messages'][1]['content']}", plain[7]["messages"][2]["content"])
    again = chat_row(
        plain[9]["messages"][1]["content"], "Another answer to the same question, so that a held-out row may leak."
    )
    first += [plain[5], near, test, again, {"messages": turns}, chat_row(" ".join(drawn(draw, 300)), "often a long question")]
    first += ["{not JSON", {"other": 1}, chat_row("What is asked here of all of us?", "What is asked here of all of us?")]
    second += [second[3], {"prompt": "only a prompt"}]
    return {"a.jsonl": first, "b.jsonl": second, "test.jsonl": [test, row("seldom")]}


def test_the_ledger_counts_what_is_in_the_files(prepared: Prepare, tokenizer: Any) -> None:
    files = busy_files(random.Random(7))
    sources = "sources: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]"
    label = "answer.split(' ')[0]"
    done = prepared(
        files,
        f"{sources}, heldout: 0.2, max_rows: 50, on_bad_row: reject, overlong: split, max_length: 256, "
        f'balance: {{label: "{label}", cap: 60}}',
    )
    ledger, paths = done.ledger, [str(done.folder.parents[1] / name) for name in ("a.jsonl", "b.jsonl")]
    sets = {"train": done.train, "heldout": done.heldout, "unused": done.unused, "rejected": done.rejects}
    # Each source and the total, row by row.
    for source, path in zip(ledger["sources"], paths, strict=True):
        assert source == {
            "path": path,
            "split": None,
            "rows_in": len(files[Path(path).name]),
            **{f"rows_{name}": counted(rows, path) for name, rows in sets.items()},
        }
    for name, rows in sets.items():
        assert ledger[f"rows_{name}"] == len(rows) == sum(source[f"rows_{name}"] for source in ledger["sources"]) > 0
    assert ledger["rows_in"] == len(files["a.jsonl"]) + len(files["b.jsonl"])
    assert ledger["rows_in"] + ledger["rows_added"] == sum(map(len, sets.values()))
    places = [row["where"] for rows in sets.values() for row in rows]
    assert len(set(places)) == len(places)
    lines = {f"{path}:{line}" for path in paths for line in range(1, len(files[Path(path).name]) + 1)}
    assert {place.partition("#")[0] for place in places} == {*lines, f"{paths[0]}:67:2"} - {f"{paths[0]}:67"}
    assert ledger["rows_added"] == len(places) - len(lines) > 0
    # Reasons.
    assert ledger["reasons"] == dict(sorted(Counter(row["reason"] for row in done.rejects).items()))
    assert ledger["unused"] == dict(sorted(Counter(row["reason"] for row in done.unused).items()))
    assert set(ledger["reasons"]) >= {"duplicate", "near-duplicate", "leaks-test", "too-long", "answer-repeats-prompt"}
    assert set(ledger["unused"]) == {"balanced-out", "over-mixture", "over-max-rows"}
    findings = Counter((row["rule"], row["action"]) for row in read_jsonl(done.folder / "findings.jsonl"))
    told = {(rule, action): count for rule, actions in ledger["findings"].items() for action, count in actions.items()}
    assert told == dict(findings)
    assert ledger["test"] == {"rows_in": 2, "rows_rejected": 0, "reasons": {}, "rows_test": 2}
    # Quality figures.
    assert ledger["tokens_train"] == sum(len(row["input_ids"]) for row in done.train)
    assert ledger["tokens_trained_on"] == sum(sum(row["loss_mask"]) for row in done.train)
    assert all(row["length"] == len(row["input_ids"]) == len(row["loss_mask"]) for row in [*done.train, *done.heldout])
    conversations = [each["messages"] for each in files["a.jsonl"] if isinstance(each, dict) and "messages" in each][:-1]
    pairs = [each for each in files["b.jsonl"] if isinstance(each, dict) and "completion" in each]
    names = (("user", "prompt"), ("assistant", "completion"))
    conversations += [[{"role": role, "content": pair[name]} for role, name in names] for pair in pairs]
    assert ledger["lengths"] == by_numpy([len(rendered(tokenizer, messages)) for messages in conversations])
    assert ledger["formats"] == {"messages": len(files["a.jsonl"]) - 2, "prompt": len(pairs)}
    assert ledger["overlong"] == {"rejected": 1, "split": 1}
    # Classes: none above the cap, and removed rows are counted as unused.
    classes = ledger["balance"]
    assert {name: facts["after"] for name, facts in classes.items()} == {
        name: min(60, facts["before"]) for name, facts in classes.items()
    }
    gone = sum(facts["before"] - facts["after"] for facts in classes.values())
    assert gone == ledger["unused"]["balanced-out"] > 0


def test_ids_and_mask_are_those_of_transformers(prepared: Prepare, tokenizer: Any) -> None:
    """The answer is the part of the whole conversation after the generation prompt, up to the end of the turn."""
    draw = random.Random(8)
    rows = [conversation(drawn(draw, 5 + i), drawn(draw, 1 + i % 4)) for i in range(12)]
    done = prepared({"train.jsonl": rows}, "heldout: 0.25")
    total, trained = Counter[str](), Counter[str]()
    for name, written in (("train", done.train), ("heldout", done.heldout)):
        for row in written:
            messages = rows[line_of(row["where"]) - 1]["messages"]
            ids, before = rendered(tokenizer, messages), len(rendered(tokenizer, messages[:-1], prompt=True))
            answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
            assert row["input_ids"] == ids
            assert [i for i, flag in enumerate(row["loss_mask"]) if flag] == list(range(before, before + len(answer) + 1))
            assert ids[before : before + len(answer) + 1] == [*answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]
            total[name] += len(ids)
            trained[name] += len(answer) + 1
    assert len(done.heldout) == 3
    assert (done.ledger["tokens_train"], done.ledger["tokens_trained_on"]) == (total["train"], trained["train"])


def test_tokens_of_pairs_are_those_of_both_sides(prepared: Prepare, tokenizer: Any) -> None:
    draw = random.Random(9)
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, (" ".join(drawn(draw, 3 + i * k)) for k in (1, 2, 3)), strict=True)) for i in range(10)]
    done = prepared({"train.jsonl": rows}, "heldout: 0.2", "objective: dpo")
    total = trained = 0
    for row in done.train:
        pair = rows[line_of(row["where"]) - 1]
        for side in ("chosen", "rejected"):
            turns = chat_row(pair["prompt"], pair[side])["messages"][1:]
            total += len(rendered(tokenizer, turns))
            trained += len(tokenizer(pair[side], add_special_tokens=False)["input_ids"]) + 1  # plus the end-of-turn token
    assert (done.ledger["tokens_train"], done.ledger["tokens_trained_on"]) == (total, trained)
    assert len(done.train) == 8


def test_of_prompts_nothing_is_trained_on(prepared: Prepare, tokenizer: Any) -> None:
    """Their reference is compared with sampled answers; its tokens are counted, since the held-out loss uses them as labels."""
    draw = random.Random(10)
    rows = [{"prompt": " ".join(drawn(draw, 9)), **({"answer": f"answer {i}"} if i % 2 else {})} for i in range(10)]
    done = prepared({"train.jsonl": rows}, "heldout: 0", "objective: grpo\ngrpo: {reward_funcs: ['length:1-9']}")
    turns = [chat_row(row["prompt"], row.get("answer", ""))["messages"][1:] for row in rows]
    lengths = [
        len(rendered(tokenizer, each if each[1]["content"] else each[:1], prompt=not each[1]["content"])) for each in turns
    ]
    assert (done.ledger["tokens_train"], done.ledger["tokens_trained_on"]) == (sum(lengths), 0)


def test_tokens_of_documents_are_each_told_once(prepared: Prepare, tokenizer: Any) -> None:
    """A piece begins with the last token of the previous one, which is counted in both and labelled only in the first."""
    draw, limit = random.Random(11), 32
    rows = [{"text": " ".join(drawn(draw, count))} for count in (3, 8, 40, 40, 90, 5, 33, 20, 64, 12)]
    rows.append(rows[4])  # ends in neither split
    ids = [[*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for row in rows]
    pieces = [math.ceil((len(each) - 1) / (limit - 1)) for each in ids]
    done = prepared({"train.jsonl": rows}, f"heldout: 0.3, max_length: {limit}", "objective: pretrain")
    train, heldout = ([line - 1 for line in sorted(set(done.lines(name)))] for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (7, 3) == (done.ledger["rows_train"], done.ledger["rows_heldout"])
    assert sorted(train + heldout) == list(range(10))
    assert done.ledger["pieces"] == {"train": sum(pieces[i] for i in train), "heldout": sum(pieces[i] for i in heldout)}
    assert done.ledger["tokens_train"] == sum(len(ids[i]) + pieces[i] - 1 for i in train)
    assert done.ledger["tokens_trained_on"] == sum(len(ids[i]) - 1 for i in train)
    assert done.ledger["lengths"] == by_numpy([len(each) for each in ids])
    assert (done.ledger["rows_in"], done.ledger["reasons"]) == (11, {"duplicate": 1})


def kept_of(labels: Sequence[str | None], seed: int = 1, **section: Any) -> dict[str | None, list[int]]:
    """The kept rows of each class, by index."""
    kept = balance(labels, BalanceSection(**section), seed)
    assert kept == sorted(set(kept))
    return {name: [index for index in kept if labels[index] == name] for name in dict.fromkeys(labels)}


@pytest.mark.parametrize(
    ("sizes", "section", "expected"),
    [
        ({"a": 50, "b": 10, "c": 4}, {"cap": 10}, {"a": 10, "b": 10, "c": 4}),
        ({"a": 50, "b": 10, "c": 4}, {"ratio": 1}, {"a": 4, "b": 4, "c": 4}),
        ({"a": 50, "b": 10, "c": 5}, {"ratio": 2.5}, {"a": 12, "b": 10, "c": 5}),  # 2.5 x 5, rounded down
        ({"a": 50, "b": 10, "c": 5}, {"ratio": 1.9}, {"a": 9, "b": 9, "c": 5}),
        ({"a": 9, "b": 1}, {"ratio": 1.5}, {"a": 1, "b": 1}),
        ({"a": 50, "b": 10, "c": 4}, {"cap": 30, "ratio": 2}, {"a": 8, "b": 8, "c": 4}),
        ({"a": 50, "b": 10, "c": 4}, {"cap": 3, "ratio": 2}, {"a": 3, "b": 3, "c": 3}),
        ({"a": 50, None: 3, "c": 4}, {"ratio": 2}, {"a": 8, None: 3, "c": 4}),  # rows without a label are not a class
        ({"a": 50, None: 30, "c": 4}, {"cap": 5}, {"a": 5, None: 30, "c": 4}),
        ({None: 7}, {"ratio": 1, "cap": 2}, {None: 7}),
        ({"a": 50, "b": 10}, {}, {"a": 50, "b": 10}),
    ],
)
def test_class_sizes_by_hand(sizes: dict[str | None, int], section: Row, expected: dict[str | None, int]) -> None:
    labels = [name for name, count in sizes.items() for _ in range(count)]
    for seed in range(5):
        random.Random(seed).shuffle(labels)
        assert {name: len(rows) for name, rows in kept_of(labels, seed, **section).items()} == expected


def test_a_class_is_drawn_from_evenly_by_the_seed_and_by_its_name() -> None:
    """Each of 20 rows is kept equally often: 5 of 20 in 800 draws are 200, with a standard deviation of 12.2."""
    labels: list[str | None] = ["a", "b"] * 20
    times: Counter[int] = Counter()
    alike, draws = 0, set()
    for seed in range(800):
        kept = kept_of(labels, seed, cap=5)
        assert kept == kept_of(labels, seed, cap=5)
        times.update(kept["a"] + kept["b"])
        alike += [index + 1 for index in kept["a"]] == kept["b"]
        draws.add(tuple(kept["a"]))
    assert set(times) == set(range(40))
    assert max(abs(count - 200) for count in times.values()) < 5 * math.sqrt(800 * 0.25 * 0.75)
    assert alike < 5  # two classes of equal size are drawn independently
    assert len(draws) > 700


def test_the_seed_of_the_recipe_draws_the_classes(prepared: Prepare) -> None:
    draw = random.Random(12)
    rows = [chat_row(" ".join(drawn(draw, 9)), json.dumps({"kind": "rare" if i % 8 == 0 else "common"})) for i in range(40)]
    left = []
    for seed in (3, 4, 3):
        done = prepared({"train.jsonl": rows}, "heldout: 0, balance: {label: answer_json.kind, ratio: 2}", f"seed: {seed}")
        kinds = Counter("rare" if (line - 1) % 8 == 0 else "common" for line in done.lines())
        assert kinds == {"common": 10, "rare": 5}
        assert done.ledger["balance"] == {"common": {"before": 35, "after": 10}, "rare": {"before": 5, "after": 5}}
        assert {row["reason"] for row in done.unused} == {"balanced-out"}
        left.append(done.lines("unused"))
    assert left[0] == left[2] != left[1]


@pytest.mark.parametrize(
    "expression",
    [
        "answer.__class__",
        "answer.__class__.__mro__[1].__subclasses__()|length",
        "answer['__class__']",
        "(answer|attr('__class__'))",
        "messages.__class__.__name__",
        "row.__init__.__globals__",
        "'{0.__class__}'.format(answer)",
        "'{x.__class__}'.format_map({'x': answer})",
        "lipsum.__globals__['os'].name",
        "cycler.__init__.__globals__.os.name",
        "self.__init__",
        "range(1000000)|list|length",  # more than the sandbox's range allows
    ],
)
def test_a_label_reaches_no_more_than_the_row(expression: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert Label(expression)({"kind": "k"}, messages) is None
    assert Label("row.kind ~ answer ~ messages|length")({"kind": "k"}, messages) == "ka2"  # fields it may access


@pytest.mark.parametrize(
    "expression",
    ["9**(9**9)", "9**999999999", "(2**20000)**(2**9)", "'a' * 10**9", "10**9 * 'a'", "row.kind * 10**9", "[1] * 10**9"],
)
def test_a_label_ends(expression: str) -> None:
    begun = time.perf_counter()
    assert Label(expression)({"kind": "k"}, []) is None
    assert time.perf_counter() - begun < 1
    assert Label("2**10 * 3 ~ 'ab' * 2 ~ 2.5**2")({}, []) == "3072abab6.25"  # small results are allowed


def test_a_label_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Label.__module__], "TEMPLATE_SECONDS", 0.05)
    label = Label("range(99999)|map('string')|map('length')|sum + range(99999)|map('string')|map('length')|sum")
    with pytest.raises(DataError, match=r"TS124.*does not terminate"):
        label({}, [])


@pytest.mark.parametrize(("value", "told"), [(0, "0"), (False, "False"), (0.0, "0.0"), ("0", "0"), (None, None), ("", None)])
def test_a_class_may_be_nought(prepared: Prepare, value: Any, told: str | None) -> None:
    assert Label("row.kind")({"kind": value}, []) == told
    assert Label("kind")({"kind": value}, []) == told
    rows = [chat_row(f"q {number} of this set", f"a {number} then") | {"kind": value} for number in range(4)]
    others = [chat_row(f"other {number} it is", f"b {number} so") | {"kind": "x"} for number in range(2)]
    section = "heldout: 0, balance: {label: kind, ratio: 1}, duplicates: {threshold: null}"
    done = prepared({"train.jsonl": [*rows, *others]}, section)
    assert len(done.lines()) == (6 if told is None else 4)


def test_all_findings_of_a_rejected_row_are_told(prepared: Prepare) -> None:
    draw = random.Random(15)
    bad = chat_row("Write to anna.b@mail.org and say\u200b hello", " \u200b ")  # an address, invisible text, and no answer
    done = prepared({"train.jsonl": [conversation(drawn(draw, 9), drawn(draw, 9)), bad]}, "heldout: 0")
    assert done.rejected("empty-answer") == [2]
    found = {row["rule"]: row["action"] for row in read_jsonl(done.folder / "findings.jsonl") if line_of(row["where"]) == 2}
    assert found["empty-answer"] == "reject"
    assert found["email"] == "warn"
    assert "fix" in found.values()
    assert {rule: done.ledger["findings"][rule] for rule in found} == {rule: {action: 1} for rule, action in found.items()}


def test_a_label_runs_no_code(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    for reach in ("lipsum.__globals__['os']", "cycler.__init__.__globals__.os", "joiner.__init__.__globals__['os']"):
        assert Label(f"{reach}.mkdir('{planted}')")({}, []) is None
    assert not planted.exists()


@pytest.mark.parametrize("text", ["{% for i in range(9) %}{% endfor %}", "a; b", "x = 1", "lambda: 1", "[i for i in row]", ""])
def test_a_label_is_one_expression(text: str) -> None:
    """No statements, so no loops."""
    with pytest.raises(RecipeError, match=r"TS003.*not a valid expression"):
        Label(text)


def test_a_label_changes_nothing(prepared: Prepare) -> None:
    draw = random.Random(13)
    rows = [conversation(drawn(draw, 9), drawn(draw, 9)) for _ in range(4)]
    plain = prepared({"train.jsonl": rows}, "heldout: 0")
    label = "messages[2].update({'content': 'forged'})"
    changed = prepared({"train.jsonl": rows}, f'heldout: 0, balance: {{label: "{label}", cap: 9}}')
    assert changed.train == plain.train


def test_a_cut_answer_keeps_what_fits_and_a_row_without_one_is_left_out(prepared: Prepare, tokenizer: Any) -> None:
    """Prompts that end before, at and after the limit: a row is kept if at least one token of its answer fits."""
    limit, longer = 64, " ".join(VOCABULARY)
    rows = [chat_row("!" * count, longer, "") for count in range(20, 55)]
    rows += [chat_row("!" * count, "ga", "") for count in (20, 30, 90)]
    data = f"heldout: 0, max_length: {limit}, overlong: truncate, duplicates: {{threshold: null}}"
    done = prepared({"train.jsonl": rows}, f"{data}, truncate_answers: true")
    kept = {line_of(row["where"]): row for row in done.train}
    decisions: Counter[str] = Counter()
    edges, whole = set(), []
    for line, row in enumerate(rows, start=1):
        messages = row["messages"]
        ids, before = rendered(tokenizer, messages), len(rendered(tokenizer, messages[:-1], prompt=True))
        edges.add(limit - before)
        if len(ids) <= limit:
            whole.append(line)
        else:
            decisions["answer-cut" if before < limit else "rejected"] += 1
        assert (line in kept) == (before < limit), (line, before)
        if before < limit:
            assert kept[line]["input_ids"] == ids[:limit]
            end = min(limit, len(ids) - 1)  # the newline after the turn is not labelled
            assert [i for i, flag in enumerate(kept[line]["loss_mask"]) if flag] == list(range(before, end))
    assert {-1, 0, 1, 2} <= edges
    assert done.ledger["overlong"] == dict(sorted(decisions.items()))
    assert done.ledger["reasons"] == {"too-long": decisions["rejected"]}
    assert done.ledger["lengths"]["quantiles"]["100 %"] > limit  # before truncation
    assert prepared({"train.jsonl": rows}, data).lines() == whole


def test_no_part_of_a_long_conversation_is_without_an_answer(prepared: Prepare) -> None:
    """Rounds of all sizes, some too long on their own, and a last question without an answer."""
    draw = random.Random(14)
    rows = []
    for _ in range(16):
        turns: list[Row] = []
        for _ in range(draw.randint(1, 6)):
            sizes = draw.choice([4, 10, 30]), draw.choice([2, 8, 60])
            turns += conversation(drawn(draw, sizes[0]), drawn(draw, sizes[1]))["messages"][1:]
        turns += [{"role": "user", "content": " ".join(drawn(draw, draw.choice([3, 50])))}] * draw.randint(0, 1)
        rows.append({"messages": turns})
    for overlong in ("truncate", "split"):
        done = prepared({"train.jsonl": rows}, f"heldout: 0.2, max_length: 70, overlong: {overlong}")
        written = [*done.train, *done.heldout]
        assert len(written) > 10
        assert all(any(row["loss_mask"][1:]) and row["length"] <= 70 for row in written)
        assert done.ledger["reasons"]["too-long"] > 0
        assert done.ledger["overlong"].keys() == {"rejected", {"truncate": "turns-dropped"}.get(overlong, overlong)}
