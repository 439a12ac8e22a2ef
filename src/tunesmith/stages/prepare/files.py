"""What `prepare` writes: Arrow files for training, and samples for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tunesmith.chat.judged import Asked, Judged
from tunesmith.chat.template import Encoded
from tunesmith.sections import ON_PAIRS, SAMPLED

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


#: A judged answer has its label beside it.
JUDGED_SCHEMA = pa.schema([*SCHEMA, ("label", pa.bool_())])

#: A prompt: the ids that are asked, the same as messages (JSON), and the reference answer where there is one.
PROMPT_SCHEMA = pa.schema([*SCHEMA, ("prompt_ids", pa.list_(pa.int32())), ("prompt", pa.string()), ("reference", pa.string())])

_SCHEMAS = {
    **dict.fromkeys(ON_PAIRS, PAIR_SCHEMA),
    "kto": JUDGED_SCHEMA,
    **dict.fromkeys(SAMPLED, PROMPT_SCHEMA),
}


def schema_of(objective: str) -> pa.Schema:
    """The columns of the rows that an objective trains on."""
    return _SCHEMAS.get(objective, SCHEMA)


class EncodedRow(Protocol):
    """A row with its place and its token ids, of both sides where it is a pair."""

    @property
    def where(self) -> str: ...
    @property
    def sides(self) -> list[Encoded]: ...
    @property
    def more(self) -> Judged | Asked | None: ...
    @property
    def prompt_ids(self) -> list[int] | None: ...


def write_arrow(path: Path, rows: Sequence[EncodedRow], schema: pa.Schema) -> None:
    """Write rows of one of the schemas as an Arrow stream, which `datasets.Dataset.from_file` maps into memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            columns: list[list[Any]] = [[row.where for row in chunk]]
            for side in range(2 if schema is PAIR_SCHEMA else 1):
                encoded = [row.sides[side] for row in chunk]
                columns.append([each.input_ids for each in encoded])
                columns.append([each.trained for each in encoded])
                columns.append([len(each.input_ids) for each in encoded])
            columns += _more_columns(chunk, schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _more_columns(rows: Sequence[EncodedRow], schema: pa.Schema) -> list[list[Any]]:
    """The columns of judged answers and of prompts that others do not have."""
    if schema is JUDGED_SCHEMA:
        return [[row.more.label for row in rows if isinstance(row.more, Judged)]]
    if schema is PROMPT_SCHEMA:
        asked = [row.more for row in rows if isinstance(row.more, Asked)]
        prompts = [json.dumps(each.prompt, ensure_ascii=False) for each in asked]
        return [[row.prompt_ids for row in rows], prompts, [each.reference for each in asked]]
    return []


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
