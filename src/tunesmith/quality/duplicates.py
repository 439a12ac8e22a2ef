"""Near-duplicate detection: MinHash (rensa) finds candidates, their shingle sets decide.

Two texts are near-duplicates if the Jaccard index of their sets of three-word runs (shingles) is at least the threshold. The
start and end of a text count as words, so that a text of one word has runs too. Signatures are split into bands; texts that
share a band are candidates (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). Candidates are compared by their
sets: exactly up to 512 runs, above that by the 512 smallest hashes of the union (bottom-k; standard error about 0.018 at 0.8).

rensa's own index, like that of datasketch, holds about a kilobyte of pointers per row. Here a row takes 12 bytes, plus 10 to
13 bytes per band, in memory; its set is stored in a temporary file.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from dataclasses import dataclass

import numpy as np
import rensa

from tunesmith.quality.words import run_hashes, words

RUN = 3  # words per run
SKETCH = 512  # hashes kept per text
_SEED = 42
_RECALL = 0.98  # minimum probability that a pair at the threshold shares a band
_SAME = 8  # rows kept per band hash: more rows than that share only common content
_PLACES = 16  # slots per bucket
_FIRST = 1 << 8  # initial buckets per band
_STRETCH = 1 << 14  # buckets moved per step
_LARGE = 1 << 14  # buckets from which a table grows by an eighth instead of doubling
_LOAD = 0.8  # maximum share of slots in use


@dataclass(frozen=True)
class Bands:
    """How a signature is split: `count` bands of `rows` hashes each."""

    count: int
    rows: int

    def chance(self, jaccard: float) -> float:
        """The probability that two texts with this Jaccard index share at least one band."""
        return 1 - (1 - jaccard**self.rows) ** self.count


def choose_bands(threshold: float, num_perm: int) -> Bands:
    """The longest bands with which a pair at the threshold is still found with a probability of 98 %."""
    choices = [Bands(num_perm // rows, rows) for rows in range(1, num_perm + 1)]
    return next((bands for bands in reversed(choices) if bands.chance(threshold) >= _RECALL), choices[0])


class NearDuplicates:
    """Near-duplicates in a growing set. `signature` depends only on the settings, so each worker may have its own instance."""

    def __init__(self, threshold: float = 0.8, num_perm: int = 64) -> None:
        self.threshold, self.num_perm = threshold, num_perm
        self.bands = choose_bands(threshold, num_perm)
        self._table = _Table(self.bands.count)
        self._records: _Records | None = None
        self._factors = (2 * np.arange(1, self.bands.rows + 1, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)

    def signature(self, text: str) -> np.ndarray:
        """uint32: one hash per band, then the smallest hashes of the text's runs, sorted (at most 512)."""
        runs = np.unique(run_hashes(["\x02"] * (RUN - 1) + words(text) + ["\x03"] * (RUN - 1), RUN))
        minhash = rensa.RMinHash(num_perm=self.num_perm, seed=_SEED)
        minhash.update(list(map(str, runs.tolist())))  # rensa's calls that take integers start threads for each text
        minima = np.asarray(minhash.digest(), np.uint64)[: self.bands.count * self.bands.rows]
        mixed = (minima.reshape(self.bands.count, self.bands.rows) * self._factors).sum(axis=1, dtype=np.uint64)
        sketch = np.unique((runs >> np.uint64(32)).astype(np.uint32))[:SKETCH]
        return np.concatenate([(mixed >> np.uint64(32)).astype(np.uint32), sketch])

    def add(self, key: str, signature: np.ndarray) -> str | None:
        """The key of an earlier near-duplicate; if there is none, stores the row under `key` and returns None."""
        earlier = self.find(signature)
        if earlier is None:
            self.remember(key, signature)
        return earlier

    def find(self, signature: np.ndarray) -> str | None:
        """The key of a stored row that is a near-duplicate; None if there is none."""
        if self._records is None:
            return None
        bands, sketch = signature[: self.bands.count], signature[self.bands.count :]
        for row in self._table.candidates(bands):
            earlier, other = self._records.read(row)
            if similarity(sketch, other) >= self.threshold:
                return earlier
        return None

    def remember(self, key: str, signature: np.ndarray) -> None:
        """Store a row under `key`, even if it is a near-duplicate of another one."""
        if self._records is None:
            self._records = _Records()
        bands, sketch = signature[: self.bands.count], signature[self.bands.count :]
        self._table.put(bands, self._records.append(key, sketch))

    def __len__(self) -> int:
        return 0 if self._records is None else len(self._records)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of two sorted sketches: exact for complete sets, else estimated from the smallest hashes of the union."""
    both = np.intersect1d(one, other, assume_unique=True)
    if len(one) < SKETCH and len(other) < SKETCH:
        return len(both) / max(1, len(one) + len(other) - len(both))
    union = np.union1d(one, other)[:SKETCH]
    return int(np.searchsorted(both, union[-1], side="right")) / len(union)


class _Table:
    """One hash table per band: buckets of 16 slots, each with a hash and a row; a full bucket overflows into the next."""

    def __init__(self, bands: int) -> None:
        self._entries = 0
        # Per band (buckets, 2, slots): hashes, and rows counted from 1; a bucket fills from its first slot.
        self._tables = [_empty(_FIRST) for _ in range(bands)]

    def candidates(self, hashes: np.ndarray) -> list[int]:
        """Rows that share a band, oldest first."""
        found: set[int] = set()
        bands, buckets = np.arange(len(hashes)), self._start(hashes)
        while len(bands):
            block = self._block(bands, buckets)
            rows = block[:, 1]
            found.update(rows[(rows > 0) & (block[:, 0] == hashes[bands, None])].tolist())
            full = rows[:, -1] > 0
            bands, buckets = bands[full], self._next(buckets[full])
        return sorted(row - 1 for row in found)

    def put(self, hashes: np.ndarray, row: int) -> None:
        """Store a row under each of its band hashes, unless eight rows are stored there."""
        if self._entries + 1 > _LOAD * self._buckets * _PLACES:
            self._grow()
        self._entries += 1
        bands, buckets = np.arange(len(hashes)), self._start(hashes)
        same = np.zeros(len(bands), np.int64)
        while len(bands):
            block = self._block(bands, buckets)
            used = np.count_nonzero(block[:, 1], axis=1)
            same = same + np.count_nonzero((block[:, 1] > 0) & (block[:, 0] == hashes[bands, None]), axis=1)
            for each in np.flatnonzero((used < _PLACES) & (same < _SAME)).tolist():
                self._tables[bands[each]][buckets[each], :, used[each]] = hashes[bands[each]], row + 1
            on = (used == _PLACES) & (same < _SAME)
            bands, buckets, same = bands[on], self._next(buckets[on]), same[on]

    @property
    def _buckets(self) -> int:
        return len(self._tables[0])

    def _block(self, bands: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        """The bucket of each band: (bands, 2, slots)."""
        return np.stack([self._tables[band][bucket] for band, bucket in zip(bands.tolist(), buckets.tolist(), strict=True)])

    def _start(self, hashes: np.ndarray) -> np.ndarray:
        return _bucket(hashes, self._buckets)

    def _next(self, buckets: np.ndarray) -> np.ndarray:
        return (buckets + 1) % self._buckets

    def _grow(self) -> None:
        """Add buckets band by band, so that only one band is in memory twice; large tables grow by an eighth."""
        buckets = 2 * self._buckets if self._buckets < _LARGE else self._buckets * 9 // 8
        for band, table in enumerate(self._tables):
            self._tables[band] = _moved(table, buckets)


def _empty(buckets: int) -> np.ndarray:
    return np.zeros((buckets, 2, _PLACES), np.uint32)


def _bucket(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of each hash: its position in the hash range, scaled to `buckets`."""
    return (hashes.astype(np.uint64) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def _moved(table: np.ndarray, buckets: int) -> np.ndarray:
    """A band's entries in a new table of `buckets` buckets; moved in steps, because a move takes six times its bytes."""
    found, fill = _empty(buckets), np.zeros(buckets, np.int64)
    for begin in range(0, len(table), _STRETCH):
        _move(table[begin : begin + _STRETCH], found, fill)
    return found


def _move(table: np.ndarray, found: np.ndarray, fill: np.ndarray) -> None:
    """Insert the entries into `found`, oldest first; `fill` counts the entries per bucket."""
    buckets, used = len(found), table[:, 1] > 0
    hashes, rows = table[:, 0][used], table[:, 1][used]
    order = np.argsort(rows)
    hashes, rows = hashes[order], rows[order]
    at = _bucket(hashes, buckets)
    while len(at):
        order = np.argsort(at, kind="stable")
        hashes, rows, at = hashes[order], rows[order], at[order]
        place = fill[at] + np.arange(len(at)) - np.searchsorted(at, at)
        fits = place < _PLACES
        found[at[fits], 0, place[fits]], found[at[fits], 1, place[fits]] = hashes[fits], rows[fits]
        fill += np.bincount(at[fits], minlength=buckets)
        hashes, rows, at = hashes[~fits], rows[~fits], (at[~fits] + 1) % buckets


class _Records:
    """Keys and sketches in an anonymous temporary file; 12 bytes per row in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._starts, self._names = array("Q", [0]), array("I")  # start offset of each record, and bytes of its key

    def append(self, key: str, sketch: np.ndarray) -> int:
        name = key.encode("utf-8", "surrogatepass")
        start = self._starts[-1]
        data = name + sketch.tobytes()
        os.pwrite(self._file.fileno(), data, start)
        self._names.append(len(name))
        self._starts.append(start + len(data))
        return len(self._names) - 1

    def read(self, row: int) -> tuple[str, np.ndarray]:
        start, name, end = self._starts[row], self._names[row], self._starts[row + 1]
        data = os.pread(self._file.fileno(), end - start, start)
        return data[:name].decode("utf-8", "surrogatepass"), np.frombuffer(data[name:], np.uint32)

    def __len__(self) -> int:
        return len(self._names)
