"""What the plan needs to know of the data: how many rows, how long, how much of them is trained on, how much they share.

Read from a prepared run exactly, from raw rows by a seeded sample. No torch here.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from tunesmith.chat.formats import to_messages
from tunesmith.errors import DataError, Problem
from tunesmith.io.rows import read_rows
from tunesmith.packing.tree import Limits, build_tree, split_by_length, split_for_trees
from tunesmith.recipe import DataSection

SAMPLE = 1_000  # rows looked at closely
_DRAWS = 24  # micro-batches drawn to see what their rows share
_SEED = 0
_CHARACTERS = 4  # of a token, where there is no tokenizer at hand
_LARGE = 2**25  # bytes of a file from which on only a sample of its rows is decoded


class Encoder(Protocol):
    """Turns text into token ids."""

    def __call__(self, text: str) -> Sequence[int]:
        """The ids."""
        ...


@dataclass(frozen=True)
class Row:
    """One row's token ids, and how many of them carry loss."""

    ids: Sequence[int]
    labelled: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch as it is computed: tokens that go through the model, labelled places, tokens of its rows."""

    tokens: int
    labelled: int
    row_tokens: int


@dataclass(frozen=True)
class DataFacts:
    """Rows to train on and a sample of them; `counted` tells how their tokens were counted."""

    rows: int
    sample: tuple[Row, ...] = field(repr=False)
    counted: str
    shares: bool = True  # whether rows may have a prefix in common

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row."""
        return statistics.fmean(len(row.ids) for row in self.sample)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of the sample."""
        return max(len(row.ids) for row in self.sample)

    def as_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "rows": self.rows,
            "sampled_rows": len(self.sample),
            "mean_tokens": round(self.mean_tokens, 1),
            "longest_tokens": self.longest,
            "mean_labelled_tokens": round(statistics.fmean(row.labelled for row in self.sample), 1),
            "counted": self.counted,
        }

    def draw(self, size: int) -> list[list[Row]]:
        """Micro-batches of `size` rows of the sample, drawn by a seed."""
        generator = random.Random(_SEED)
        return [generator.choices(self.sample, k=size) for _ in range(_DRAWS)]

    def batches(self, size: int, max_tokens: int | None = None, *, packing: bool) -> list[list[Batch]]:
        """`size` rows as micro-batches of at most `max_tokens`, drawn by a seed several times, and last the longest rows."""
        longest = sorted(self.sample, key=lambda row: -len(row.ids))
        picks = [*self.draw(size), [longest[i % len(longest)] for i in range(size)]]
        return [_batches(rows, Limits(max_tokens), packing=packing and self.shares) for rows in picks]


def _batches(rows: Sequence[Row], limits: Limits, *, packing: bool) -> list[Batch]:
    ids = [row.ids for row in rows]
    groups = split_for_trees(ids, limits) if packing else split_by_length([len(each) for each in ids], limits)
    return [_batch([rows[index] for index in group], packing=packing) for group in groups]


def _batch(rows: Sequence[Row], *, packing: bool) -> Batch:
    total, labelled = sum(len(row.ids) for row in rows), sum(row.labelled for row in rows)
    padded = len(rows) * max(len(row.ids) for row in rows)
    computed = len(build_tree([row.ids for row in rows]).ids) if packing else padded
    return Batch(computed, max(1, labelled), total)


def assumed(rows: int, length: int) -> DataFacts:
    """Rows of one length that share nothing and carry loss everywhere: what is assumed where no data is given."""
    count = 64
    sample = tuple(Row(range(number * length, (number + 1) * length), length - 1) for number in range(count))
    return DataFacts(rows, sample, "assumed", shares=False)


def read_facts(data: DataSection, encode: Encoder | None) -> DataFacts:
    """Facts of the recipe's train rows. Without an encoder four characters count as a token.

    Raises DataError where the file is missing, or no sampled row can be used.
    """
    path = Path(data.train)
    total, raw = 0, list[Any]()
    for value in _values(path):
        total += 1
        if value is not None:
            raw.append(value)
    sample = [row for value in _drawn(raw, SAMPLE) if (row := _row(value, data, encode)) is not None]
    sample = [row for row in sample if len(row.ids) <= data.max_length] or sample[:1]
    if not sample:
        why = "the plan's time and memory depend on the rows' lengths"
        raise DataError(
            Problem("TS109", "no row of the sample can be used", str(path), why, "run `tunesmith prepare` to see why")
        )
    share = len(sample) / min(len(raw), SAMPLE)
    rows = max(1, round(total * share * (1 - data.heldout)))
    rows = min(rows, data.max_rows) if data.max_rows else rows
    counted = "the model's tokenizer" if encode is not None else f"{_CHARACTERS} characters a token"
    return DataFacts(rows, tuple(sample), counted)


def _values(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each row's value; of a large .jsonl file only a share is decoded, None stands for the others."""
    if path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size < _LARGE:
        yield from (row.value for row in read_rows(path))
        return
    generator = random.Random(_SEED)
    share = min(1.0, _LARGE / path.stat().st_size)
    with path.open("rb") as handle:
        for line in handle:
            if not line.strip():
                continue
            try:
                value = json.loads(line) if generator.random() < share else None
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else None


def _drawn(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values if len(values) <= count else random.Random(_SEED).sample(values, count)


def _row(value: dict[str, Any], data: DataSection, encode: Encoder | None) -> Row | None:
    """A row rendered in ChatML, which is about as long as any template; None where it is no conversation."""
    messages = to_messages(value, "", data.format, data.system)
    if isinstance(messages, Problem):
        return None
    ids: list[int] = []
    labelled = 0
    for message in messages:
        head = _encoded(f"<|im_start|>{message['role']}\n", encode)
        body = _encoded(f"{message['content']}<|im_end|>\n", encode)
        ids += [*head, *body]
        labelled += len(body) if message["role"] == "assistant" else 0
    return Row(ids, labelled)


def _encoded(text: str, encode: Encoder | None) -> Sequence[int]:
    if encode is not None:
        return encode(text)
    return [crc32(text[start : start + _CHARACTERS].encode()) for start in range(0, len(text), _CHARACTERS)]


def prepared_facts(folder: Path) -> DataFacts:
    """Facts of a prepared run's `data/` folder, exact but for the sample."""
    import pyarrow as pa

    with pa.memory_map(str(folder / "train.arrow")) as source:
        table = pa.ipc.open_stream(source).read_all()
        picked = sorted(_drawn(range(len(table)), SAMPLE))
        rows = table.take(picked).to_pylist()
    sample = tuple(Row(row["input_ids"], sum(row["trained"][1:])) for row in rows)
    return DataFacts(len(table), sample, "prepared rows")


def encoder_of(model: Path) -> Encoder | None:
    """The tokenizer in a model folder, by the tokenizers library alone; None where it has no tokenizer.json."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
