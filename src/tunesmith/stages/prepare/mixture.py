"""Mixes several sources: at fixed ratios, or by their sizes to the power of 1 / temperature (arXiv 1907.05019, 3.1)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from tunesmith.recipe import DataSection


def shares(sizes: Sequence[int], data: DataSection) -> list[float] | None:
    """Each source's share of the set, summing to 1; None if all rows of all sources are used. An empty source has share 0."""
    if len(data.sources) < 2:
        return None
    if data.temperature is not None:
        raw = [size ** (1 / data.temperature) if size else 0.0 for size in sizes]
    elif data.sources[0].weight is not None:
        raw = [source.weight or 0.0 if size else 0.0 for source, size in zip(data.sources, sizes, strict=True)]
    else:
        return None
    return [each / sum(raw) for each in raw] if sum(raw) else None


def targets(sizes: Sequence[int], wanted: Sequence[float]) -> list[int]:
    """Rows per source in the largest set with these shares that repeats no row; at least one per source."""
    total = min(size / share for size, share in zip(sizes, wanted, strict=True) if share)
    return [min(size, max(1, round(total * share))) if share else 0 for size, share in zip(sizes, wanted, strict=True)]


def kept_of_each(sources: Sequence[int], data: DataSection, seed: int) -> list[int]:
    """Indices of the rows to keep, in order, by a seeded draw per source; `sources` has each row's source index."""
    counts = Counter(sources)
    sizes = [counts[number] for number in range(max(1, len(data.sources)))]
    wanted = shares(sizes, data)
    if wanted is None:
        return list(range(len(sources)))
    members: list[list[int]] = [[] for _ in sizes]
    for index, source in enumerate(sources):
        members[source].append(index)
    kept: list[int] = []
    for number, (rows, count) in enumerate(zip(members, targets(sizes, wanted), strict=True)):
        kept += random.Random(f"{seed} {number}").sample(rows, count)
    return sorted(kept)
