"""A machine that is calibrated."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import torch

from tunesmith.hardware.calibration import ROOFLINE, Bound, Entry, add_entries
from tunesmith.hardware.catalogue import read_gpus, this_device
from tunesmith.planner.plan import METHODS


def calibrated(file: Path) -> Path:
    """Write one measurement of this machine for each method and bound, so that no run has to calibrate it first."""
    device = this_device(read_gpus())
    seen = {"device": device.name, "torch": torch.__version__, "date": "2026-01-01", "source": "probe", "roofline": ROOFLINE}
    entries = [
        Entry(**seen, method=method, dtype=device.compute_dtype, hidden_size=64, time=2.0, bound=bound)
        for method, bound in itertools.product(METHODS, get_args(Bound))
    ]
    assert add_entries(file, entries)
    return file
