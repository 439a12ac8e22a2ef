"""Counts of what happened to the rows, and the row problems that stop `prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.errors import DataError, Problem
from tunesmith.recipe import PartSection

_MAX_SHOWN = 20  # kinds of problems named in one error; the rest are counted
#: The counts that say where rows end up.
SPLITS = ("rows_train", "rows_heldout", "rows_unused", "rows_rejected")
_QUANTILES = (50, 90, 95, 99, 100)


@dataclass
class Ledger:
    """Counts that add up: rows_in + rows_added = rows_train + rows_heldout + rows_unused + rows_rejected.

    A row is rejected for its content. It is unused if it is good but more than was requested (`max_rows`, balance, mixture).
    Documents count as rows; `pieces` has the number of rows that they become, in train and held-out.
    """

    sources: Sequence[PartSection]
    rows_in: Counter[int] = field(default_factory=Counter)  # by source index, like the next four
    rows_train: Counter[int] = field(default_factory=Counter)
    rows_heldout: Counter[int] = field(default_factory=Counter)
    rows_unused: Counter[int] = field(default_factory=Counter)
    rows_rejected: Counter[int] = field(default_factory=Counter)
    rows_added: int = 0  # by splitting rows
    reasons: Counter[str] = field(default_factory=Counter)  # of rejected rows
    unused: Counter[str] = field(default_factory=Counter)  # why rows are unused
    formats: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    overlong: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Counter[str]] = field(default_factory=dict)  # rule -> action -> rows
    notes: Counter[str] = field(default_factory=Counter)
    tokens_train: int = 0
    tokens_trained_on: int = 0
    pieces: dict[str, int] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # balance, template, overlap

    def as_dict(self) -> dict[str, Any]:
        """The content of ledger.json; `reasons` maps each reason to its count."""
        counts = {name: getattr(self, name) for name in ("rows_in", *SPLITS)}
        totals = {name: counter.total() for name, counter in counts.items()}
        if totals["rows_in"] + self.rows_added != sum(totals[name] for name in SPLITS):
            raise AssertionError("rows in and rows out do not add up")
        return {
            **totals,
            "rows_added": self.rows_added,
            "reasons": _sorted(self.reasons),
            "unused": _sorted(self.unused),
            "tokens_train": self.tokens_train,
            "tokens_trained_on": self.tokens_trained_on,
            "notes": _sorted(self.notes),
            "test": self.test,
            "formats": _sorted(self.formats),
            "sources": [
                {"path": part.path, "split": part.split, **{name: counter[number] for name, counter in counts.items()}}
                for number, part in enumerate(self.sources)
            ],
            "lengths": length_facts(self.lengths),
            "overlong": _sorted(self.overlong),
            "findings": {rule: _sorted(actions) for rule, actions in sorted(self.findings.items())},
            **({"pieces": self.pieces} if self.pieces else {}),
            **self.more,
        }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def length_facts(lengths: Counter[int]) -> dict[str, Any]:
    """Quantiles in tokens, and rows by length: `histogram` maps each bin's upper edge (a power of two) to its rows."""
    if not lengths:
        return {"quantiles": {}, "histogram": {}}
    ordered = sorted(lengths.items())
    total, seen, position = lengths.total(), 0, 0
    quantiles: dict[str, int] = {}
    for length, count in ordered:
        seen += count
        while position < len(_QUANTILES) and 100 * seen >= _QUANTILES[position] * total:
            quantiles[f"{_QUANTILES[position]} %"] = length
            position += 1
    edges = [1 << power for power in range(3, max(4, (ordered[-1][0] - 1).bit_length() + 1))]
    bins = {str(edge): 0 for edge in edges}
    for length, count in ordered:
        bins[str(next(edge for edge in edges if length <= edge))] += count
    return {"quantiles": quantiles, "histogram": bins}


class Problems:
    """Row problems by kind: the first of each and a count, so that memory does not grow with their number."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], Problem] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._more = 0

    def add(self, problem: Problem) -> None:
        """Count one row."""
        kind = (problem.code, problem.what)
        if kind in self._first or len(self._first) < _MAX_SHOWN:
            self._first.setdefault(kind, problem)
            self._counts[kind] += 1
        else:
            self._more += 1

    def raise_any(self) -> None:
        """Raise DataError with each kind, the last with how to continue without such rows; does nothing if there are none."""
        shown = []
        for kind, problem in self._first.items():
            others = self._counts[kind] - 1
            shown.append(replace(problem, where=f"{problem.where} and {others} more rows") if others else problem)
        if shown:
            more = f" ({self._more} more rows with problems of other kinds are not shown)" if self._more else ""
            hint = f"{shown[-1].fix}; or set data.on_bad_row: reject to drop and count such rows{more}"
            raise DataError([*shown[:-1], replace(shown[-1], fix=hint)])
