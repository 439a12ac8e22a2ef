"""The article's table on a GPU, and what tunesmith makes of it: trains the cases of cases.py one after the other.

    benchmarks/gpu/run.sh --json benchmarks/results/gpu_NAME.json [--minutes 9]    # on a machine with a GPU
    benchmarks/gpu/run.sh --dry-run --json /tmp/dry.json                           # tiny models, on a CPU too
    benchmarks/gpu/run.sh --trace H100 --json benchmarks/results/gpu_traced.json   # what is planned and traced; needs no GPU

The result is written after each case, so that a run that is cut off leaves what it has measured. Cases that the time left does
not hold are left out and named, and so are those that fail, with what they said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, Case
from common import claim, parser, report, write_result

from tunesmith.hardware.freed import grow_segments

HERE = Path(__file__).resolve().parent
CALIBRATED = {"qlora": "qlora_7b", "lora": "lora_7b", "full": "full_7b"}  # the case with which a method is calibrated
GIB = 2**30

Row = dict[str, Any]


def asked_of(case: str, *more: str, environment: Mapping[str, str], timeout: float) -> Row:
    """The answer of a case's process. Raises RuntimeError with what it said last where it fails."""
    command = [sys.executable, str(HERE / "cell.py"), case, *more]
    try:
        added = {**os.environ, **environment}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=added, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RuntimeError(" ".join(lines[-3:])[:500] if lines else f"it ended with {done.returncode}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def errors(rows: Sequence[Row], measured: str, predicted: str) -> list[float]:
    """How far predictions are over what was measured, in percent, of the rows of Table 3."""
    return [100 * (row[predicted] / row[measured] - 1) for row in rows if 3 in row["tables"] and row.get(measured)]


def claims_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The claims that the measured rows support."""
    by_name = {row["part"]: row for row in rows}
    claims = []
    for method in ("qlora", "lora", "full"):
        for name, key, unit, scale in (
            (f"{method}_7b", "peak_memory_bytes", "GiB", GIB),
            (f"stock_{method}_7b", "peak_memory_bytes", "GiB", GIB),
            (f"{method}_7b_fast", "tokens_per_second", "tokens/s", 1),
        ):
            if name in by_name:
                label = name.removesuffix("_fast") + ("_peak_gib" if unit == "GiB" else "_tokens_per_second")
                claims.append(claim(label, by_name[name][key] / scale, unit))
    if "qlora_70b" in by_name:
        claims.append(claim("qlora_70b_peak_gib", by_name["qlora_70b"]["peak_memory_bytes"] / GIB, "GiB"))
    if {"qlora_7b_fast", "lora_7b_fast"} <= by_name.keys():
        ratio = by_name["qlora_7b_fast"]["tokens_per_second"] / by_name["lora_7b_fast"]["tokens_per_second"]
        claims.append(claim("qlora_to_lora_speed_ratio", ratio, "x"))
    memory, seconds = errors(rows, "peak_memory_bytes", "planned_bytes"), errors(rows, "seconds_per_step", "planned_seconds")
    if memory:
        claims.append(claim("plan_memory_max_error_percent", max(map(abs, memory)), "%"))
        claims.append(claim("plan_memory_under_max_percent", max(0.0, -min(memory)), "%"))
        claims.append(claim("plan_time_max_error_percent", max(map(abs, seconds)), "%"))
    peers = [by_name[name]["rows_per_second"] for name in ("sharing_7b_trl_padded", "sharing_7b_trl_packed") if name in by_name]
    if peers and "sharing_7b" in by_name:
        ratio = by_name["sharing_7b"]["rows_per_second"] / max(peers)
        claims.append(claim("prefix_sharing_rows_per_second_ratio", ratio, "x"))
    return claims


def traced_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How far the plan's bytes are from those of the trace."""
    made = [100 * (row["planned_allocated_bytes"] / row["traced_bytes"] - 1) for row in rows]
    claims = [claim(f"{row['part']}_traced_gib", row["traced_bytes"] / GIB, "GiB") for row in rows]
    return [*claims, claim("plan_vs_trace_max_error_percent", max(map(abs, made)), "%")] if rows else []


class Clock:
    """What is left of the time that a run may take."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return 24 * 3600.0 if self._end is None else self._end - time.monotonic()


def calibrate(cases: Sequence[Case], more: Sequence[str], environment: Mapping[str, str], clock: Clock) -> None:
    """Measure a step of each method for the plans of the cases; a method that fails is planned by the roofline alone."""
    for name in (case for method, case in CALIBRATED.items() if any(each.method == method for each in cases)):
        try:
            asked_of(name, "--calibrate", *more, environment=environment, timeout=min(180.0, max(1.0, clock.left)))
        except RuntimeError as error:
            print(f"calibration with {name} failed: {error}", file=sys.stderr, flush=True)


def chosen(only: Sequence[str] | None, *, trace: bool) -> list[Case]:
    """The cases that are asked for. TRL's are not traced, nor one whose states are elsewhere: fake tensors share a device."""
    asked = [case for case in CASES if only is None or case.name in only]
    return [case for case in asked if not trace or (3 in case.tables and not case.train.get("optimizer_offloading"))]


def options() -> argparse.Namespace:
    """What the command line asks for."""
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--minutes", type=float, help="leave out cases that this time does not hold")
    made.add_argument("--only", action="append", choices=[case.name for case in CASES], help="one case; may be repeated")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="tiny models: that the script works, not how fast it is")
    what.add_argument("--trace", metavar="GPU", help="plan and trace for a card of the catalogue instead of measuring")
    return made.parse_args()


def main() -> None:
    """Measure or trace the cases, and report after each."""
    asked = options()
    grow_segments()  # of the cases' processes
    clock = Clock(asked.minutes)
    more = ["--dry-run"] if asked.dry_run else ["--trace", asked.trace] if asked.trace else []
    kind = "dry run" if asked.dry_run else "trace" if asked.trace else "measured"
    claims = traced_claims if asked.trace else claims_of
    cases = chosen(asked.only, trace=bool(asked.trace))
    rows: list[Row] = []
    left_out: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        # The calibration is this run's own: an empty file, in which each method's probe leaves its entry.
        environment = {"TUNESMITH_CALIBRATION": str(Path(scratch) / "calibration.json")}
        if not asked.trace:
            calibrate(cases, more, environment, clock)
        for case in cases:
            if clock.left < case.seconds:
                left_out.append({"part": case.name, "reason": "no time was left"})
                continue
            try:
                rows.append(asked_of(case.name, *more, environment=environment, timeout=min(600.0, clock.left)))
                print(json.dumps(rows[-1]), flush=True)
            except RuntimeError as error:
                left_out.append({"part": case.name, "reason": str(error)})
                print(f"{case.name} failed: {error}", file=sys.stderr, flush=True)
            write_result(asked.json, claims(rows), rows, kind=kind, left_out=left_out)
    report(asked.json, claims(rows), rows, kind=kind, left_out=left_out)
    if not rows or (asked.dry_run and left_out):
        sys.exit(1)


if __name__ == "__main__":
    main()
