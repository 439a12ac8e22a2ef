"""What `prepare` writes: Arrow files for training, and samples for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tunesmith.chat.judged import Asked, Judged
from tunesmith.chat.template import Encoded, sides_of
from tunesmith.recipe import RowKind

SCHEMA = pa.schema(
    [
        ("where", pa.string()),  # file:line of the row
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),  # whether the id carries loss, same length
        ("length", pa.int32()),
    ]
)

#: Preference pairs: the columns of SCHEMA hold the chosen side.
PAIR_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("rejected_input_ids", pa.list_(pa.int32())),
        ("rejected_loss_mask", pa.list_(pa.bool_())),
        ("rejected_length", pa.int32()),
    ]
)

#: A judged answer, with its label.
JUDGED_SCHEMA = pa.schema([*SCHEMA, ("label", pa.bool_())])

#: A prompt: its ids, the same as messages (JSON), and the reference answer if there is one.
PROMPT_SCHEMA = pa.schema([*SCHEMA, ("prompt_ids", pa.list_(pa.int32())), ("prompt", pa.string()), ("reference", pa.string())])

SCHEMAS: Mapping[RowKind, pa.Schema] = {
    "conversation": SCHEMA,
    "document": SCHEMA,
    "pair": PAIR_SCHEMA,
    "judged": JUDGED_SCHEMA,
    "prompt": PROMPT_SCHEMA,
}

#: Also in the intermediate file: the row's line of JSON, null in a document's further pieces.
_SHOWN = pa.field("shown", pa.string())


def intermediate_schema(kind: RowKind) -> pa.Schema:
    """The training columns, and each row's line of JSON."""
    return SCHEMAS[kind].append(_SHOWN)


class EncodedRow(Protocol):
    """A row with its location and its token ids, of both sides for a pair."""

    @property
    def where(self) -> str: ...
    @property
    def sides(self) -> list[Encoded]: ...


class IntermediateRow(EncodedRow, Protocol):
    """The same with the other fields of its kind, its JSON form, and the training rows that it becomes."""

    @property
    def more(self) -> Judged | Asked | None: ...
    @property
    def prompt_ids(self) -> list[int] | None: ...
    @property
    def shown(self) -> dict[str, Any]: ...
    @property
    def rows(self) -> Sequence[IntermediateRow]: ...


@dataclass(frozen=True)
class ShownRow:
    """A row read back from the written file."""

    where: str
    sides: list[Encoded]


def intermediate_batch(made: Sequence[IntermediateRow], kind: RowKind) -> pa.RecordBatch:
    """Encoded rows, or the pieces of documents, as one Arrow batch: the training columns, and `shown`."""
    schema = intermediate_schema(kind)
    rows = [row for each in made for row in each.rows]
    columns: list[list[Any]] = [[row.where for row in rows]]
    for side in range(2 if "rejected_length" in schema.names else 1):
        encoded = [row.sides[side] for row in rows]
        columns.append([each.input_ids for each in encoded])
        columns.append([each.loss_mask for each in encoded])
        columns.append([len(each.input_ids) for each in encoded])
    columns += _more_columns(rows, schema)
    columns.append([line for each in made for line in _lines(each)])
    arrays = [pa.array(column, each.type) for column, each in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _lines(row: IntermediateRow) -> list[str | None]:
    """A row's line of JSON, and None for each of its further pieces."""
    return [json.dumps({"where": row.where, **row.shown}, ensure_ascii=False), *[None] * (len(row.rows) - 1)]


def _more_columns(rows: Sequence[IntermediateRow], schema: pa.Schema) -> list[list[Any]]:
    """The columns that only judged answers and prompts have."""
    if "label" in schema.names:
        return [[row.more.label for row in rows if isinstance(row.more, Judged)]]
    if "prompt" in schema.names:
        asked = [row.more for row in rows if isinstance(row.more, Asked)]
        prompts = [json.dumps(each.prompt, ensure_ascii=False) for each in asked]
        return [[row.prompt_ids for row in rows], prompts, [each.reference for each in asked]]
    return []


class ArrowWriter:
    """An Arrow stream that grows batch by batch; `datasets.Dataset.from_file` memory-maps it."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, schema)
        self._schema = schema

    def write(self, batch: pa.RecordBatch) -> None:
        """Append the rows of a batch, with the columns that the schema has."""
        if batch.num_rows:
            self._stream.write_batch(batch.select(self._schema.names))

    def close(self) -> None:
        """Finish the stream."""
        self._stream.close()
        self._sink.close()


def shown_rows(batch: pa.RecordBatch, count: int) -> Iterator[ShownRow]:
    """The first rows of a batch, for a person to look at."""
    for row in batch.slice(0, count).to_pylist():
        yield ShownRow(row["where"], sides_of(row))


def marked_sample(row: EncodedRow, tokenizer: Any) -> str:
    """The row as text with its labelled spans between \u27e6 and \u27e7, under a header line with its location.

    For a pair, both sides, one under the other.
    """
    names = ("chosen", "rejected") if len(row.sides) > 1 else ("",)
    return "".join(_marked(f"{row.where} {name}".strip(), side, tokenizer) for name, side in zip(names, row.sides, strict=True))


def _marked(where: str, encoded: Encoded, tokenizer: Any) -> str:
    parts = []
    for text, labelled in encoded.spans(tokenizer):
        parts.append(f"\u27e6{text}\u27e7" if labelled else text)
    count = f"{sum(encoded.loss_mask)} of {len(encoded.loss_mask)} tokens labelled"
    return f"=== {where} ({count}) ===\n{''.join(parts)}\n"
