"""Measurements compared with predictions, kept for later plans: one entry per calibration and per finished run.

An entry records the device, torch version, date, method, dtype and width, the ratio of the measured step time to the roofline
prediction, and the bytes that the process took beyond the closed form. The entries are JSON in the cache folder, newest last.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from tunesmith.io.atomic import read_json, write_json

#: Version of the roofline that entries are compared with: changes whenever planner/speed.py predicts different seconds.
ROOFLINE = 2

#: What bounds a step's time: the device's computation, or on a GPU the host's kernel launches.
Bound = Literal["computing", "starting"]

_KEEP = 500  # entries; older ones are dropped
_NEAR = 16  # newest matching entries that are used

#: Ratio of the 95 % bound to the median without measurements, and its minimum with measurements.
UNKNOWN_SPREAD = 1.5
LEAST_SPREAD = 1.1


@dataclass(frozen=True)
class Entry:
    """One measurement: `time` is measured / predicted; `bytes_beside` is the peak minus the bytes requested from the allocator.

    `roofline` is the version that predicted, and `bound` what it assumed to bound the step. `bytes_beside` is not a ratio:
    these bytes belong to the process (libraries, compiled GEMMs, slack) and do not grow with the model. None if not measured.
    """

    device: str
    torch: str
    date: str
    source: Literal["probe", "run"]
    method: str
    dtype: str
    hidden_size: int
    time: float
    bytes_beside: int | None = None
    roofline: int = 1
    bound: Bound = "computing"


@dataclass(frozen=True)
class Correction:
    """Factors for a prediction: `typical` for the median, `safe` for the 95 % bound, both from `measurements` data points."""

    typical: float
    safe: float
    measurements: int


def read_entries(file: Path) -> list[Entry]:
    """All entries, oldest first; empty if there is no file. A damaged file counts as empty, because it is only a cache.

    Fields that only earlier versions wrote are ignored.
    """
    names = [each.name for each in fields(Entry)]
    try:
        return [Entry(**{name: entry[name] for name in names if name in entry}) for entry in read_json(file)]
    except (OSError, ValueError, TypeError):
        return []


def add_entries(file: Path, entries: Sequence[Entry]) -> bool:
    """Append to the file atomically; False if it cannot be written, which only makes later plans less accurate."""
    kept = [*read_entries(file), *entries][-_KEEP:]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, [asdict(entry) for entry in kept])
    except OSError:
        return False
    return True


def today() -> str:
    """The date of an entry, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def time_correction(
    entries: Sequence[Entry], device: str, method: str, dtype: str, hidden_size: int, bound: Bound = "computing"
) -> Correction:
    """The correction of a step's time for this method and dtype on this device, from the models of the nearest width.

    Entries for another roofline version, or for steps with another bound, are not used.
    """
    sought = (device, method, dtype, ROOFLINE, bound)
    like = [e for e in entries if (e.device, e.method, e.dtype, e.roofline, e.bound) == sought]
    if not like:
        return Correction(1.0, UNKNOWN_SPREAD, 0)
    distance = min(abs(math.log(entry.hidden_size / hidden_size)) for entry in like)
    nearest = [e.time for e in like if abs(math.log(e.hidden_size / hidden_size)) <= distance + 1e-9][-_NEAR:]
    return _correction(nearest)


def bytes_beside(entries: Sequence[Entry], device: str, method: str) -> int | None:
    """Bytes that the process takes beyond a step's own on this device: the maximum of the newest runs, None before the first.

    The maximum, because the same run varies by some tens of MiB from day to day and must not exceed its plan.
    """
    like = [e.bytes_beside for e in entries if (e.device, e.method) == (device, method) and e.bytes_beside is not None]
    return max(like[-_NEAR:], default=None)


def _correction(ratios: Sequence[float]) -> Correction:
    typical = statistics.median(ratios)
    return Correction(typical, max(LEAST_SPREAD * typical, max(ratios) * 1.02), len(ratios))
