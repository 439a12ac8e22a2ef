"""What `prepare` writes: Arrow files for training, and samples for a person."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tunesmith.chat.template import Encoded

_BATCH = 1000  # rows in one Arrow record batch

SCHEMA = pa.schema(
    [
        ("where", pa.string()),  # file:line of the row
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),  # whether the id carries loss, same length
        ("length", pa.int32()),
    ]
)

#: The same of preference pairs: those columns are of the chosen side.
PAIR_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("rejected_input_ids", pa.list_(pa.int32())),
        ("rejected_trained", pa.list_(pa.bool_())),
        ("rejected_length", pa.int32()),
    ]
)


class EncodedRow(Protocol):
    """A row with its place and its token ids, of both sides where it is a pair."""

    @property
    def where(self) -> str: ...
    @property
    def sides(self) -> list[Encoded]: ...


def write_arrow(path: Path, rows: Sequence[EncodedRow], *, pairs: bool) -> None:
    """Write rows, or pairs, as an Arrow stream, which `datasets.Dataset.from_file` maps into memory."""
    schema = PAIR_SCHEMA if pairs else SCHEMA
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            columns: list[list[Any]] = [[row.where for row in chunk]]
            for side in range(2 if pairs else 1):
                encoded = [row.sides[side] for row in chunk]
                columns.append([each.input_ids for each in encoded])
                columns.append([each.trained for each in encoded])
                columns.append([len(each.input_ids) for each in encoded])
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def marked_sample(row: EncodedRow, tokenizer: Any) -> str:
    """The row as text with its trained stretches between \u27e6 and \u27e7, under a line that tells where it stands.

    Of a pair both sides, one under the other.
    """
    names = ("chosen", "rejected") if len(row.sides) > 1 else ("",)
    return "".join(_marked(f"{row.where} {name}".strip(), side, tokenizer) for name, side in zip(names, row.sides, strict=True))


def _marked(where: str, encoded: Encoded, tokenizer: Any) -> str:
    parts = []
    for trained, group in groupby(zip(encoded.input_ids, encoded.trained, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        parts.append(f"\u27e6{text}\u27e7" if trained else text)
    count = f"{sum(encoded.trained)} of {len(encoded.trained)} tokens trained on"
    return f"=== {where} ({count}) ===\n{''.join(parts)}\n"
