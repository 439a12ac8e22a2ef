"""Rows that are nearly the same: MinHash (rensa) to find candidates, their sets of word runs to decide.

Two texts are near duplicates when the Jaccard index of their sets of three-word runs is at least the threshold. A text's ends
count as words, so that a text of one word has runs too. Signatures are cut into bands; texts that share a band are candidates
(Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4), and each candidate is decided by its sets: exactly up to 512
runs, above by the 512 smallest hashes of the union (bottom-k; standard error about 0.018 at 0.8).

rensa's own index, like that of datasketch, holds about a kilobyte of pointers a row. Here a row takes 16 bytes and 16 to 32 a
band in memory; its set lies in a temporary file.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from dataclasses import dataclass

import numpy as np
import rensa

from tunesmith.quality.words import run_hashes, words

RUN = 3  # words of a run
SKETCH = 512  # hashes kept of a text
_SEED = 42
_RECALL = 0.98  # least chance that a pair at the threshold shares a band
_SAME = 8  # rows kept of those that share a band: more are alike in what they all have
_FIRST = 1 << 12  # places of a band's table at the start; always a power of two


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `count` bands of `rows` hashes each."""

    count: int
    rows: int

    def chance(self, jaccard: float) -> float:
        """That two texts of this Jaccard index share at least one band."""
        return 1 - (1 - jaccard**self.rows) ** self.count


def choose_bands(threshold: float, num_perm: int) -> Bands:
    """The longest bands with which a pair at the threshold is still found with a chance of 98 %."""
    choices = [Bands(num_perm // rows, rows) for rows in range(1, num_perm + 1)]
    return next((bands for bands in reversed(choices) if bands.chance(threshold) >= _RECALL), choices[0])


class NearDuplicates:
    """Near duplicates of a growing set. `signature` depends on the settings alone, so workers may have an instance each."""

    def __init__(self, threshold: float = 0.8, num_perm: int = 64) -> None:
        self.threshold, self.num_perm = threshold, num_perm
        self.bands = choose_bands(threshold, num_perm)
        self._table = _Table(self.bands.count)
        self._records: _Records | None = None
        self._factors = (2 * np.arange(1, self.bands.rows + 1, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)

    def signature(self, text: str) -> np.ndarray:
        """uint32: a hash for each band, then the smallest hashes of the text's runs, sorted (at most 512)."""
        runs = np.unique(run_hashes(["\x02"] * (RUN - 1) + words(text) + ["\x03"] * (RUN - 1), RUN))
        minhash = rensa.RMinHash(num_perm=self.num_perm, seed=_SEED)
        minhash.update(list(map(str, runs.tolist())))  # the calls that take numbers start threads for each text
        minima = np.asarray(minhash.digest(), np.uint64)[: self.bands.count * self.bands.rows]
        mixed = (minima.reshape(self.bands.count, self.bands.rows) * self._factors).sum(axis=1, dtype=np.uint64)
        sketch = np.unique((runs >> np.uint64(32)).astype(np.uint32))[:SKETCH]
        return np.concatenate([(mixed >> np.uint64(32)).astype(np.uint32), sketch])

    def add(self, key: str, signature: np.ndarray) -> str | None:
        """The key of an earlier row that this one nearly equals; else None, and the row is remembered under `key`."""
        if self._records is None:
            self._records = _Records()
        bands, sketch = signature[: self.bands.count], signature[self.bands.count :]
        for row in self._table.candidates(bands):
            earlier, other = self._records.read(row)
            if similarity(sketch, other) >= self.threshold:
                return earlier
        self._table.put(bands, self._records.append(key, sketch))
        return None

    def __len__(self) -> int:
        return 0 if self._records is None else len(self._records)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of two sorted sketches: exact for whole sets, else estimated from the smallest hashes of their union."""
    both = np.intersect1d(one, other, assume_unique=True)
    if len(one) < SKETCH and len(other) < SKETCH:
        return len(both) / max(1, len(one) + len(other) - len(both))
    union = np.union1d(one, other)[:SKETCH]
    return int(np.searchsorted(both, union[-1], side="right")) / len(union)


class _Table:
    """For each band an open table of (hash, row); equal hashes stand in one run of places."""

    def __init__(self, bands: int) -> None:
        self._bands = np.arange(bands)
        self._entries = 0
        self._make(_FIRST)

    def _make(self, places: int) -> None:
        self._hashes = np.zeros((len(self._bands), places), np.uint32)
        self._rows = np.full((len(self._bands), places), -1, np.int32)

    def candidates(self, hashes: np.ndarray) -> list[int]:
        """Rows that share a band, the oldest first."""
        found: set[int] = set()
        bands, places = self._bands, self._start(hashes)
        while len(bands):
            rows = self._rows[bands, places]
            found.update(rows[(rows >= 0) & (self._hashes[bands, places] == hashes[bands])].tolist())
            bands, places = bands[rows >= 0], self._next(places[rows >= 0])
        return sorted(found)

    def put(self, hashes: np.ndarray, row: int) -> None:
        """Remember a row under each of its bands, unless eight rows stand there."""
        if 4 * (self._entries + 1) > 3 * self._rows.shape[1]:
            self._grow()
        self._entries += 1
        bands, places = self._bands, self._start(hashes)
        same = np.zeros(len(bands), np.int64)
        while len(bands):
            free = self._rows[bands, places] < 0
            self._rows[bands[free], places[free]] = row
            self._hashes[bands[free], places[free]] = hashes[bands[free]]
            same = same + (self._hashes[bands, places] == hashes[bands])
            on = ~free & (same < _SAME)
            bands, places, same = bands[on], self._next(places[on]), same[on]

    def _start(self, hashes: np.ndarray) -> np.ndarray:
        return hashes.astype(np.int64) & (self._rows.shape[1] - 1)

    def _next(self, places: np.ndarray) -> np.ndarray:
        return (places + 1) & (self._rows.shape[1] - 1)

    def _grow(self) -> None:
        """Twice the places, band by band: entries move in order of age, all that find their place free at once."""
        hashes, rows = self._hashes, self._rows
        self._make(2 * rows.shape[1])
        for band in range(len(self._bands)):
            used = np.flatnonzero(rows[band] >= 0)
            order = used[np.argsort(rows[band, used], kind="stable")]
            self._refill(band, hashes[band, order], rows[band, order])

    def _refill(self, band: int, hashes: np.ndarray, rows: np.ndarray) -> None:
        places = self._start(hashes)
        while len(places):
            free = np.flatnonzero(self._rows[band, places] < 0)
            _, first = np.unique(places[free], return_index=True)
            placed = free[first]
            self._hashes[band, places[placed]], self._rows[band, places[placed]] = hashes[placed], rows[placed]
            left = np.ones(len(places), bool)
            left[placed] = False
            hashes, rows, places = hashes[left], rows[left], self._next(places[left])


class _Records:
    """Keys and sketches in a temporary file that nobody else sees; in memory 16 bytes each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this does
        self._starts, self._middles = array("Q", [0]), array("Q")

    def append(self, key: str, sketch: np.ndarray) -> int:
        name = key.encode("utf-8", "surrogatepass")
        start = self._starts[-1]
        data = name + sketch.tobytes()
        os.pwrite(self._file.fileno(), data, start)
        self._middles.append(start + len(name))
        self._starts.append(start + len(data))
        return len(self._middles) - 1

    def read(self, row: int) -> tuple[str, np.ndarray]:
        start, middle, end = self._starts[row], self._middles[row], self._starts[row + 1]
        data = os.pread(self._file.fileno(), end - start, start)
        return data[: middle - start].decode("utf-8", "surrogatepass"), np.frombuffer(data[middle - start :], np.uint32)

    def __len__(self) -> int:
        return len(self._middles)
