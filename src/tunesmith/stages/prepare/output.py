"""What grows while rows stream, and the second pass that writes the sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunesmith.stages.prepare.files import ArrowWriter, ShownRow, schema_of, shown_rows
from tunesmith.stages.prepare.ledger import Ledger
from tunesmith.stages.prepare.whole import HELDOUT, TRAIN, WholeSet


class Lines:
    """A JSONL file in a folder that is not committed yet, written line by line."""

    def __init__(self, path: Path) -> None:
        self._handle = path.open("w", encoding="utf-8")

    def write(self, value: dict[str, Any]) -> None:
        """Append a value. Half a surrogate pair, which a file's name may hold, is written as an escape."""
        line = json.dumps(value, ensure_ascii=False)
        self._handle.write(line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._handle.close()


class Spool:
    """Encoded rows on disk between the two passes; `close` it, then `batches` reads them back, and it is gone."""

    def __init__(self, folder: Path, *, pairs: bool) -> None:
        self.schema = schema_of(pairs=pairs)
        self.pairs = pairs
        self._path = folder / "spool.arrow"
        self._writer = ArrowWriter(self._path, self.schema.append(pa.field("messages", pa.string())))

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self._writer.write(batch)

    def close(self) -> None:
        """No more rows."""
        self._writer.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in batches as written; the file is removed after the last."""
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
        self._path.unlink()


def write_sets(spool: Spool, whole: WholeSet, target: Path, ledger: Ledger, shown: int) -> list[ShownRow]:
    """Write train.arrow, heldout.arrow and heldout.jsonl and count their rows and tokens; returns the first train rows."""
    train, heldout = (ArrowWriter(target / f"{name}.arrow", spool.schema) for name in ("train", "heldout"))
    lines = Lines(target / "heldout.jsonl")
    fates, sources = np.frombuffer(whole.fates, np.uint8), np.asarray(whole.sources)
    first: list[ShownRow] = []
    start = 0
    for batch in spool.batches():
        fate, source = fates[start : start + batch.num_rows], sources[start : start + batch.num_rows]
        start += batch.num_rows
        ledger.rows_train.update(source[fate == TRAIN].tolist())
        ledger.rows_heldout.update(source[fate == HELDOUT].tolist())
        trained = batch.filter(pa.array(fate == TRAIN))
        _count_tokens(trained, ledger, pairs=spool.pairs)
        first += shown_rows(trained, shown - len(first))
        train.write(trained)
        kept = batch.filter(pa.array(fate == HELDOUT))
        heldout.write(kept)
        for where, messages in zip(kept["where"].to_pylist(), kept["messages"].to_pylist(), strict=True):
            lines.write({"where": where, "messages": json.loads(messages)})
    for each in (train, heldout, lines):
        each.close()
    return first


def _count_tokens(batch: pa.RecordBatch, ledger: Ledger, *, pairs: bool) -> None:
    for side in ("", "rejected_") if pairs else ("",):
        ledger.tokens_train += pc.sum(batch[f"{side}length"]).as_py() or 0
        ledger.tokens_trained_on += pc.sum(pc.list_flatten(batch[f"{side}trained"])).as_py() or 0
