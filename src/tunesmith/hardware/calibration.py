"""What was measured against what was predicted, kept for the next plan: one entry for each probe and each finished run.

An entry says on which device, with which torch, when, for which method, dtype and width a step took how many times as long as
the roofline says, and how many bytes the process took beside the closed form's. The cache folder holds them, JSON, newest last.
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

#: Which roofline entries are held against: another number wherever planner/speed.py comes to other seconds.
ROOFLINE = 2

#: What a step waits for: what the device computes, or on a GPU for the host that starts it.
Bound = Literal["computing", "starting"]

_KEEP = 500  # entries; older ones go
_NEAR = 16  # the newest of the like ones that count

#: 95 % bound over the median where nothing was measured, and the least one where something was.
UNKNOWN_SPREAD = 1.5
LEAST_SPREAD = 1.1


@dataclass(frozen=True)
class Entry:
    """One measurement: `time` is measured over predicted; `bytes_beside` the peak less what the allocator was asked for.

    `roofline` is the one that predicted, and `bound` what it had the step wait for. Bytes and no ratio: they are the process's
    own (libraries, compiled products, slack), and so do not grow with the model. None where memory was not measured.
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
    """Multiply a prediction by `typical` for the median and by `safe` for the 95 % bound; `measurements` it rests on."""

    typical: float
    safe: float
    measurements: int


def read_entries(file: Path) -> list[Entry]:
    """All entries, oldest first; none where there is no file. A damaged file counts as none: it is only a cache.

    What earlier versions wrote beside the fields of today is left out.
    """
    names = [each.name for each in fields(Entry)]
    try:
        return [Entry(**{name: entry[name] for name in names if name in entry}) for entry in read_json(file)]
    except (OSError, ValueError, TypeError):
        return []


def add_entries(file: Path, entries: Sequence[Entry]) -> bool:
    """Append to the file, atomically; False where it cannot be written, of which only later plans have less."""
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
    """The correction of a step's time: of this method and dtype on this device, models of the nearest width first.

    Entries that were held against another roofline say nothing of this one, nor those of steps that wait for something else.
    """
    sought = (device, method, dtype, ROOFLINE, bound)
    like = [e for e in entries if (e.device, e.method, e.dtype, e.roofline, e.bound) == sought]
    if not like:
        return Correction(1.0, UNKNOWN_SPREAD, 0)
    distance = min(abs(math.log(entry.hidden_size / hidden_size)) for entry in like)
    nearest = [e.time for e in like if abs(math.log(e.hidden_size / hidden_size)) <= distance + 1e-9][-_NEAR:]
    return _correction(nearest)


def bytes_beside(entries: Sequence[Entry], device: str, method: str) -> int | None:
    """Bytes that the process takes beside a step's own on this device: the most of the newest runs, None before the first.

    The most, as the same run takes some tens of MiB more on one day than on another, and a plan is not to be passed.
    """
    like = [e.bytes_beside for e in entries if (e.device, e.method) == (device, method) and e.bytes_beside is not None]
    return max(like[-_NEAR:], default=None)


def _correction(ratios: Sequence[float]) -> Correction:
    typical = statistics.median(ratios)
    return Correction(typical, max(LEAST_SPREAD * typical, max(ratios) * 1.02), len(ratios))
