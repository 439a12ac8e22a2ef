"""The files that grow while rows stream, and the second pass that writes the sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunesmith.recipe import RowKind
from tunesmith.stages.prepare.files import SCHEMAS, ArrowWriter, ShownRow, intermediate_schema, shown_rows
from tunesmith.stages.prepare.ledger import Ledger
from tunesmith.stages.prepare.whole import HELDOUT, TRAIN, WholeSet


class Lines:
    """A JSONL file in a folder that is not committed yet, written line by line."""

    def __init__(self, path: Path) -> None:
        self._handle = path.open("w", encoding="utf-8")

    def write(self, value: dict[str, Any]) -> None:
        """Append a value. A lone surrogate, which a file name may contain, is written as an escape."""
        line = json.dumps(value, ensure_ascii=False)
        self._handle.write(line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._handle.close()


class IntermediateRows:
    """Encoded rows on disk between the two passes; after `close`, `batches` reads them back and removes the file."""

    def __init__(self, folder: Path, kind: RowKind) -> None:
        self.schema, self.kind = SCHEMAS[kind], kind
        self._path = folder / "intermediate.arrow"
        self._writer = ArrowWriter(self._path, intermediate_schema(kind))

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self._writer.write(batch)

    def close(self) -> None:
        """Finish writing."""
        self._writer.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in batches as written; the file is removed after the last."""
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
        self._path.unlink()


@dataclass
class Written:
    """What the ledger does not have: the first train rows, and how many rows are longer than the model's positions."""

    shown: list[ShownRow] = field(default_factory=list)
    beyond: int = 0


def write_sets(
    rows: IntermediateRows, whole: WholeSet, target: Path, ledger: Ledger, shown: int, positions: int | None
) -> Written:
    """Write train.arrow, heldout.arrow and heldout.jsonl, and count rows and tokens; pieces share their document's split."""
    train, heldout = (ArrowWriter(target / f"{name}.arrow", rows.schema) for name in ("train", "heldout"))
    lines = Lines(target / "heldout.jsonl")
    splits, sources = np.frombuffer(whole.splits, np.uint8), np.asarray(whole.sources)
    ledger.rows_train.update(sources[splits == TRAIN].tolist())
    ledger.rows_heldout.update(sources[splits == HELDOUT].tolist())
    splits = np.repeat(splits, whole.pieces)
    if rows.kind == "document":
        ledger.pieces = {"train": int((splits == TRAIN).sum()), "heldout": int((splits == HELDOUT).sum())}
    written = Written()
    start = 0
    for batch in rows.batches():
        split = splits[start : start + batch.num_rows]
        start += batch.num_rows
        trained = batch.filter(pa.array(split == TRAIN))
        _count_tokens(trained, ledger, rows.kind)
        written.shown += shown_rows(trained, shown - len(written.shown))
        train.write(trained)
        kept = batch.filter(pa.array(split == HELDOUT))
        heldout.write(kept)
        for line in kept["shown"].drop_null().to_pylist():
            lines.write(json.loads(line))
        if positions is not None:
            written.beyond += _longer(trained, positions) + _longer(kept, positions)
    for each in (train, heldout, lines):
        each.close()
    return written


def _sides(batch: pa.RecordBatch) -> tuple[str, ...]:
    """The column name prefix of each side."""
    return ("", "rejected_") if "rejected_length" in batch.schema.names else ("",)


def _count_tokens(batch: pa.RecordBatch, ledger: Ledger, kind: RowKind) -> None:
    for side in _sides(batch):
        ledger.tokens_train += pc.sum(batch[f"{side}length"]).as_py() or 0
        if kind != "prompt":  # a reference is compared with samples and never trained on
            ledger.tokens_trained_on += pc.sum(pc.list_flatten(batch[f"{side}loss_mask"])).as_py() or 0


def _longer(batch: pa.RecordBatch, positions: int) -> int:
    """How many rows have a side longer than `positions`."""
    longest = np.max([np.asarray(batch[f"{side}length"]) for side in _sides(batch)], axis=0)
    return int((longest > positions).sum())
