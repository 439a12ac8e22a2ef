"""What the plan needs to know about the data: row count, lengths, labelled tokens, and how much the rows share.

Exact for a prepared run; for raw rows, a seeded sample plus the longest of all rows, because the longest rows determine the
peak of a step, however few they are. No torch here.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from tunesmith.chat.columns import mapped
from tunesmith.chat.document import to_document, to_pieces
from tunesmith.chat.formats import Message, to_messages
from tunesmith.chat.preference import to_pair
from tunesmith.engine.packing.tree import Limits, build_tree, computed_length, filled, split_by_length, split_units_for_trees
from tunesmith.errors import DataError, PlanError, Problem
from tunesmith.io.documents import reader_of
from tunesmith.io.rows import Row as FileRow
from tunesmith.recipe import OBJECTIVES, DataSection, Objective, RowKind, SourceSection
from tunesmith.runs import check_columns

SAMPLE = 1_000  # rows analysed in detail
TAIL = 32  # number of longest rows
_LONG = 1_000  # candidates for those: the longest rows by characters
_DRAWS = 24  # micro-batches drawn to estimate what their rows share
_SEED = 0
_END = -1  # placeholder for the end-of-document id
_CHARACTERS = 4  # per token, if no tokenizer is available
_LARGE = 2**25  # bytes; of larger files only a sample of the rows is decoded


class Encoder(Protocol):
    """Turns text into token ids."""

    def __call__(self, text: str) -> Sequence[int]:
        """The ids."""
        ...


@dataclass(frozen=True)
class Row:
    """One row's token ids, and how many are labelled; for a preference pair the chosen side, with the rejected one.

    The last `tail` ids do not pass through the model (engine/packing/batch.py).
    """

    ids: Sequence[int]
    labelled: int
    rejected: Row | None = None
    tail: int = 1

    @property
    def computed(self) -> Sequence[int]:
        """The ids that pass through the model."""
        return self.ids[: max(1, len(self.ids) - self.tail)]

    @property
    def sides(self) -> tuple[Row, ...]:
        """The sequences that pass through the model for this row."""
        return (self,) if self.rejected is None else (self, self.rejected)


@dataclass(frozen=True)
class Batch:
    """A micro-batch as computed: tokens that pass through the model, labelled positions, tokens of its rows."""

    tokens: int
    labelled: int
    row_tokens: int


@dataclass(frozen=True)
class DataFacts:
    """The number of train rows and a sample of them; `counted` says how their tokens were counted."""

    rows: int
    sample: tuple[Row, ...] = field(repr=False)
    counted: str
    shares: bool = True  # whether rows may share a prefix
    tail: tuple[Row, ...] = field(default=(), repr=False)  # the longest of all rows

    @property
    def sequences(self) -> list[Row]:
        """The rows of the sample, and the rejected sides of pairs."""
        return _sides(self.sample)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per sequence."""
        return statistics.fmean(len(row.ids) for row in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in all rows."""
        return max(len(row.ids) for row in _sides([*self.sample, *self.tail]))

    def as_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "rows": self.rows,
            "sampled_rows": len(self.sample),
            "mean_tokens": round(self.mean_tokens, 1),
            "longest_tokens": self.longest,
            "mean_labelled_tokens": round(statistics.fmean(row.labelled for row in self.sequences), 1),
            "sequences_per_row": len(self.sample[0].sides),
            "counted": self.counted,
        }

    def draw(self, size: int) -> list[list[Row]]:
        """Seeded draws of `size` rows from the sample."""
        generator = random.Random(_SEED)
        return [generator.choices(self.sample, k=size) for _ in range(_DRAWS)]

    def batches(self, size: int, limits: Limits, *, packing: bool) -> list[list[Batch]]:
        """`size` rows as micro-batches within the limits, in several seeded draws; the last draw has the longest rows."""
        longest = sorted(self.tail or self.sample, key=lambda row: -sum(len(side.ids) for side in row.sides))
        picks = [*self.draw(size), [longest[i % len(longest)] for i in range(size)]]
        return [_batches(rows, limits, packing=packing and self.shares) for rows in picks]


def _sides(rows: Sequence[Row]) -> list[Row]:
    return [side for row in rows for side in row.sides]


def _batches(rows: Sequence[Row], limits: Limits, *, packing: bool) -> list[Batch]:
    units = [[side.computed for side in row.sides] for row in rows]
    if packing:
        groups = split_units_for_trees(units, limits)
    else:
        groups = split_by_length([max(map(len, unit)) for unit in units], limits, rows=len(units[0]))
    return [_batch(_sides([rows[index] for index in group]), packing=packing) for group in groups]


def _batch(rows: Sequence[Row], *, packing: bool) -> Batch:
    total, labelled = sum(len(row.ids) for row in rows), sum(row.labelled for row in rows)
    if not packing:
        return Batch(len(rows) * max(len(row.computed) for row in rows), max(1, labelled), total)
    computed = len(build_tree([row.computed for row in rows]).ids)
    return Batch(filled(computed), filled(max(1, labelled)), total)


def refuse_unplanned(name: str) -> Objective:
    """The objective of this name. Raises PlanError if the planner does not model its steps."""
    objective = OBJECTIVES[name]
    if objective.planned:
        return objective
    sampled = "answers are sampled and scored in each step" if objective.sampled else "its steps run in TRL"
    what = f"no plan for objective: {name}: {sampled}, which the planner does not model"
    why = "the predicted memory and time would be wrong"
    raise PlanError(Problem("TS705", what, "objective", why, "set method in the recipe and train without a plan"))


def assumed(rows: int, length: int, objective: str = "sft") -> DataFacts:
    """Rows or pairs of one length, with nothing shared and loss on every token: the assumption if no data is given."""
    kind = refuse_unplanned(objective).rows
    count = 64
    made = [Row(range(number * length, (number + 1) * length), length - 1) for number in range(2 * count)]
    first, second = made[:count], made[count:]
    if kind == "pair":
        first = [replace(chosen, rejected=rejected) for chosen, rejected in zip(first, second, strict=True)]
    return DataFacts(rows, tuple(first), "assumed", shares=False)


def read_facts(data: DataSection, encode: Encoder | None, objective: str = "sft") -> DataFacts:
    """Facts of the recipe's train rows or pairs. Without an encoder, four characters count as a token.

    Raises DataError if the file is missing, or no sampled row can be used.
    """
    kind = refuse_unplanned(objective).rows
    total, raw, long = 0, list[tuple[Any, SourceSection]](), list[tuple[int, int, Any, SourceSection]]()

    def is_long(size: int) -> bool:
        return len(long) < _LONG or size > long[0][0]

    for part in data.parts:
        for value, size, is_drawn in _values(part, reader_of(documents=kind == "document"), is_long):
            total += 1
            if value is None:
                continue
            if is_drawn:
                raw.append((value, part))
            if is_long(size):
                (heapq.heappush if len(long) < _LONG else heapq.heapreplace)(long, (size, total, value, part))
    drawn = _drawn(raw, SAMPLE)
    sample = [row for value, part in drawn for row in _rows(value, part, data, encode, kind)]
    sample = [row for row in sample if max(len(side.ids) for side in row.sides) <= data.max_length] or sample[:1]
    if not sample:
        why = "the plan's time and memory depend on the row lengths"
        raise DataError(
            Problem("TS109", "no row of the sample can be used", data.parts[0].path, why, "run `tunesmith prepare` to see why")
        )
    share = len(sample) / min(len(raw), SAMPLE)
    rows = max(1, round(total * share * (1 - data.heldout)))
    if data.max_rows:
        each = max(1.0, share) if kind == "document" else 1.0  # pieces of a document
        rows = min(rows, round(data.max_rows * each))
    counted = "the model's tokenizer" if encode is not None else f"{_CHARACTERS} characters a token"
    longest = [(value, part) for _, _, value, part in sorted(long, key=lambda each: each[:2], reverse=True)]
    tail = _longest((row for value, part in longest for row in _rows(value, part, data, encode, kind)), data)
    return DataFacts(rows, tuple(_drawn(sample, SAMPLE)), counted, tail=tail)


def _longest(rows: Iterable[Row], data: DataSection) -> tuple[Row, ...]:
    """The first rows that fit, as they are or after a cut."""
    fitting = (row if max(len(side.ids) for side in row.sides) <= data.max_length else _cut(row, data) for row in rows)
    return tuple(itertools.islice((row for row in fitting if row is not None), TAIL))


def _cut(row: Row, data: DataSection) -> Row | None:
    """A row that is too long, cut to `max_length` tokens; None if it is rejected, as pairs always are."""
    if data.overlong == "reject":
        return None
    return replace(row, ids=row.ids[: data.max_length], labelled=min(row.labelled, data.max_length - 1))


def _values(
    part: SourceSection, read: Callable[[Path | str, str | None], Iterable[FileRow]], is_long: Callable[[int], bool]
) -> Iterator[tuple[dict[str, Any] | None, int, bool]]:
    """Each row's value, its characters, and whether it belongs to the unbiased sample.

    In a large .jsonl file, only a random share and rows that pass `is_long` are decoded; the others yield None.
    """
    path = Path(part.path)
    if path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size < _LARGE:
        for row in read(part.path, part.split):
            yield row.value, _characters(row.value), True
        return
    generator = random.Random(_SEED)
    share = min(1.0, _LARGE / path.stat().st_size)
    with path.open("rb") as handle:
        for line in handle:
            if not line.strip():
                continue
            drawn = generator.random() < share
            try:
                value = json.loads(line) if drawn or is_long(len(line)) else None
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None, len(line), drawn


def _characters(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _drawn(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values if len(values) <= count else random.Random(_SEED).sample(values, count)


def _rows(value: dict[str, Any], part: SourceSection, data: DataSection, encode: Encoder | None, kind: RowKind) -> list[Row]:
    """The rows that a value yields: one or none, or the pieces of a document (with one more id, for its end)."""
    named = mapped(value, part.columns or {}, "")
    if isinstance(named, Problem):
        return []
    if kind != "document":
        row = _row(named, part.format or "auto", data.system, encode, kind)
        return [] if row is None else [row]
    document = to_document(named, "")
    if isinstance(document, Problem):
        return []
    pieces = to_pieces([*_encoded(document.text, encode), _END], data.max_length)
    return [Row(piece.input_ids, sum(piece.loss_mask)) for piece in pieces]


def _row(value: Mapping[str, Any], row_format: str, system: str | None, encode: Encoder | None, kind: RowKind) -> Row | None:
    """A row rendered in ChatML, about as long as with any template; None if it is not a conversation or pair."""
    if kind == "conversation":
        messages = to_messages(value, "", row_format, system)
        return None if isinstance(messages, Problem) else _rendered(messages, encode)
    pair = to_pair(value, "", row_format, system)
    if isinstance(pair, Problem):
        return None
    rejected = _rendered(pair.rejected, encode, last_answer=True)
    return replace(_rendered(pair.chosen, encode, last_answer=True), rejected=rejected)


def _rendered(messages: Sequence[Message], encode: Encoder | None, *, last_answer: bool = False) -> Row:
    ids: list[int] = []
    labelled = 0
    for message in messages:
        head = _encoded(f"<|im_start|>{message['role']}\n", encode)
        body = _encoded(f"{message['content']}<|im_end|>\n", encode)
        ids += [*head, *body]
        labelled = (0 if last_answer else labelled) + (len(body) if message["role"] == "assistant" else 0)
    return Row(ids, labelled)


def _encoded(text: str, encode: Encoder | None) -> Sequence[int]:
    if encode is not None:
        return encode(text)
    return [crc32(text[start : start + _CHARACTERS].encode()) for start in range(0, len(text), _CHARACTERS)]


def prepared_facts(folder: Path) -> DataFacts:
    """Facts of a prepared run's `data/` folder, exact except for the sample; of pairs if it holds pairs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    path = folder / "train.arrow"
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
        check_columns(table.column_names, path)
        picked = sorted(_drawn(range(len(table)), SAMPLE))
        rows = table.take(picked).to_pylist()
        names = [name for name in ("input_ids", "rejected_input_ids") if name in table.column_names]
        lengths = np.sum([pc.list_value_length(table[name]).to_numpy() for name in names], axis=0)
        longest = table.take(np.argsort(-lengths, kind="stable")[:TAIL]).to_pylist()
    sample, tail = (tuple(_prepared(row) for row in some) for some in (rows, longest))
    return DataFacts(len(table), sample, "prepared rows", tail=tail)


def _prepared(row: dict[str, Any]) -> Row:
    made = _of_ids(row["input_ids"], row["loss_mask"])
    if "rejected_input_ids" not in row:
        return made
    return replace(made, rejected=_of_ids(row["rejected_input_ids"], row["rejected_loss_mask"]))


def _of_ids(ids: Sequence[int], loss_mask: Sequence[bool]) -> Row:
    return Row(ids, sum(loss_mask[1:]), tail=len(ids) - computed_length(loss_mask))


def encoder_of(model: Path) -> Encoder | None:
    """The tokenizer in a model folder, through the tokenizers library only; None if there is no tokenizer.json."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
