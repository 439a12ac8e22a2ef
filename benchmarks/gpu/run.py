"""The published table of memory and speed on a GPU, in its configurations and in ours: trains the cases of cases.py in turn.

    benchmarks/gpu/run.sh --json benchmarks/results/gpu_NAME.json [--minutes 9]    # on a machine with a GPU
    benchmarks/gpu/run.sh --dry-run --json /tmp/dry.json                           # tiny models, on a CPU too
    benchmarks/gpu/run.sh --trace H100 --json benchmarks/results/gpu_traced.json   # the plan and the trace; needs no GPU

The result is written after each case, so an interrupted run keeps what it has measured. Cases that do not fit in the remaining
time are skipped and named, and so are cases that fail, with their last output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cases import CASES, Case
from common import claim, parser, report, write_result

from tunesmith.hardware.allocators import grow_segments

HERE = Path(__file__).resolve().parent
#: The cases that calibrate each method: one where the host takes the longer part of a step, one where the GPU does.
CALIBRATED = {method: (f"{method}_7b", f"{method}_7b_fast") for method in ("qlora", "lora", "full")}
GIB = 2**30

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The task of a process: to measure a case, or with `calibrates` to measure its step for the plans."""

    case: Case
    options: Sequence[str]
    calibrates: bool = False
    profiles: Path | None = None

    @property
    def command(self) -> list[str]:
        """Arguments of cell.py."""
        own = ["--calibrate"] if self.calibrates else []
        if self.profiles is not None and not self.calibrates:
            own = ["--profile", str(self.profiles / f"{self.case.name}.txt")]
        return [self.case.name, *own, *self.options]


class Cell:
    """A case's process. It imports immediately but does not touch the device until asked, so it can start early."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]) -> None:
        self._out, self._said = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 # closed with the process
        command = [sys.executable, str(HERE / "waiting.py"), *arguments]
        added = {**os.environ, **environment}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._out, stderr=self._said, env=added, text=True
        )

    def answer(self, timeout: float) -> Row:
        """Its measurements. Raises RuntimeError with its last output if it fails."""
        try:
            self._process.communicate("go\n", timeout)
        except subprocess.TimeoutExpired as error:
            self.stop()
            raise RuntimeError(f"it took more than {timeout:.0f} s") from error
        answered, said = ([line for line in each.splitlines() if line.strip()] for each in map(_read, (self._out, self._said)))
        if self._process.returncode != 0:
            print(*said[-30:], sep="\n", file=sys.stderr, flush=True)
            raise RuntimeError(" ".join(said[-3:])[-500:] if said else f"it ended with {self._process.returncode}")
        row: Row = json.loads(answered[-1])
        return row

    def stop(self) -> None:
        """Stop it if it is still running."""
        self._process.kill()
        self._process.wait()
        for file in (self._out, self._said, self._process.stdin):
            if file is not None:
                file.close()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def errors(rows: Sequence[Row], measured: str, predicted: str) -> list[float]:
    """Errors of the predictions relative to the measurements, in percent, for the rows of Table 3."""
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
    """The traced bytes of each case, and the plan's largest error relative to the trace."""
    made = [100 * (row["planned_allocated_bytes"] / row["traced_bytes"] - 1) for row in rows]
    claims = [claim(f"{row['part']}_traced_gib", row["traced_bytes"] / GIB, "GiB") for row in rows]
    return [*claims, claim("plan_vs_trace_max_error_percent", max(map(abs, made)), "%")] if rows else []


class Clock:
    """The time that a run has left."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return 24 * 3600.0 if self._end is None else self._end - time.monotonic()


def one_ahead(jobs: Sequence[Job], environment: Mapping[str, str]) -> Iterator[tuple[Job, Cell]]:
    """Each job with its process; the next process is already started."""
    with ExitStack() as started:

        def start(job: Job) -> Cell:
            cell = Cell(*job.command, environment=environment)
            started.callback(cell.stop)
            return cell

        cells = [start(job) for job in jobs[:1]]
        for number, job in enumerate(jobs):
            cells += [start(each) for each in jobs[number + 1 : number + 2]]
            yield job, cells[number]
            cells[number].stop()


def jobs_of(cases: Sequence[Case], options: Sequence[str], profiles: Path | None, *, calibrates: bool) -> list[Job]:
    """One job per case; with `calibrates`, calibration steps for each of their methods come first."""
    methods = [method for method in CALIBRATED if any(case.method == method for case in cases)] if calibrates else []
    by_name = {case.name: case for case in CASES}
    first = [Job(by_name[name], options, calibrates=True) for method in methods for name in CALIBRATED[method]]
    return [*first, *(Job(case, options, profiles=profiles) for case in cases)]


def described() -> dict[str, Any]:
    """The machine's description, from a process that exits, because finding it uses GPU memory."""
    command = [sys.executable, "-c", "import json, common; print(json.dumps(common.this_machine()))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def chosen(only: Sequence[str] | None, *, trace: bool) -> list[Case]:
    """The cases asked for. TRL's are not traced, nor those with offloaded states: FakeTensors share one device."""
    asked = [case for case in CASES if only is None or case.name in only]
    return [case for case in asked if not trace or (3 in case.tables and not case.train.get("optimizer_offloading"))]


def options() -> argparse.Namespace:
    """The parsed command line."""
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--minutes", type=float, help="leave out cases that this time does not hold")
    made.add_argument("--only", action="append", choices=[case.name for case in CASES], help="one case; may be repeated")
    made.add_argument(
        "--profiles", type=Path, metavar="FOLDER", help="write there what the operators of each case's last step take"
    )
    made.add_argument(
        "--calibration", type=Path, metavar="FILE", help="an earlier result from this GPU whose calibration serves"
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="tiny models: that the script works, not how fast it is")
    what.add_argument("--trace", metavar="GPU", help="plan and trace for a card of the catalogue instead of measuring")
    return made.parse_args()


def main() -> None:
    """Measure or trace the cases, and report after each."""
    asked = options()
    grow_segments()  # for the processes of the cases
    clock = Clock(asked.minutes)
    more = ["--dry-run"] if asked.dry_run else ["--trace", asked.trace] if asked.trace else []
    kind = "dry run" if asked.dry_run else "trace" if asked.trace else "measured"
    claims = traced_claims if asked.trace else claims_of
    cases = chosen(asked.only, trace=bool(asked.trace))
    hardware = described()
    if asked.profiles is not None:
        asked.profiles.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    left_out: list[Row] = []
    known = json.loads(asked.calibration.read_text(encoding="utf-8"))["calibration"] if asked.calibration else []
    found: dict[str, Any] = {"kind": kind, "hardware": hardware, "calibration": known, "left_out": left_out}
    with tempfile.TemporaryDirectory() as scratch:
        # The calibration belongs to this run: each method's calibration adds its entries to the file.
        entries = Path(scratch) / "calibration.json"
        entries.write_text(json.dumps(known), encoding="utf-8")
        jobs = jobs_of(cases, more, asked.profiles, calibrates=not (asked.trace or known))
        for job, cell in one_ahead(jobs, {"TUNESMITH_CALIBRATION": str(entries)}):
            name, allowed = job.case.name, 180.0 if job.calibrates else 600.0
            if clock.left < job.case.seconds:
                left_out += [] if job.calibrates else [{"part": name, "reason": "no time was left"}]
                continue
            try:
                row = cell.answer(min(allowed, clock.left))
            except RuntimeError as error:
                print(f"{' '.join(job.command)} failed: {error}", file=sys.stderr, flush=True)
                # A method without calibration is planned by the roofline alone.
                left_out += [] if job.calibrates else [{"part": name, "reason": str(error)}]
            else:
                print(json.dumps(row), flush=True)
                rows += [] if job.calibrates else [row]
                known += row["calibration"] if job.calibrates else []
            write_result(asked.json, claims(rows), rows, **found)
    report(asked.json, claims(rows), rows, **found)
    if not rows or (asked.dry_run and left_out):
        sys.exit(1)


if __name__ == "__main__":
    main()
