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


class EncodedRow(Protocol):
    """A row with its place and its token ids."""

    @property
    def where(self) -> str: ...
    @property
    def encoded(self) -> Encoded | None: ...


def write_arrow(path: Path, rows: Sequence[EncodedRow]) -> None:
    """Write rows as an Arrow stream, which `datasets.Dataset.from_file` maps into memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            encoded = [row.encoded for row in chunk if row.encoded is not None]
            columns = [
                [row.where for row in chunk],
                [row.input_ids for row in encoded],
                [row.trained for row in encoded],
                [len(row.input_ids) for row in encoded],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))


def marked_sample(row: EncodedRow, tokenizer: Any) -> str:
    """The row as text with its trained stretches between \u27e6 and \u27e7, under a line that tells where it stands."""
    if row.encoded is None:
        raise AssertionError("a sample is drawn from encoded rows")
    pairs = zip(row.encoded.input_ids, row.encoded.trained, strict=True)
    parts = []
    for trained, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        parts.append(f"\u27e6{text}\u27e7" if trained else text)
    count = f"{sum(row.encoded.trained)} of {len(row.encoded.trained)} tokens trained on"
    return f"=== {row.where} ({count}) ===\n{''.join(parts)}\n"
