"""Replans the measured cases of a result with today's planner and the calibration of that run; needs no GPU.

    PYTHONPATH=benchmarks .venv/bin/python benchmarks/gpu/replan.py benchmarks/results/gpu_NAME.json

Measurements stay unchanged; predictions and their errors are rewritten.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CASES, Case
from cell import GPUS, planned, promised, recipe_of, rows_of
from run import claims_of

from tunesmith.hardware.catalogue import Device, named_by_driver
from tunesmith.models import catalogue


def case_of(row: dict[str, Any]) -> Case:
    """The case as it was when the row was measured."""
    (named,) = (case for case in CASES if case.name == row["part"])
    return replace(named, rows=row["rows"], own=row["length"] - row["shared"], shared=row["shared"], train=row["train"])


def predicted(case: Case, device: Device) -> dict[str, Any]:
    """The plan's figures for it on the device, with the calibration that TUNESMITH_CALIBRATION names."""
    values, _ = catalogue.find_config(case.model)
    plan = planned(case, recipe_of(case, case.model, device.kind), rows_of(case, values["vocab_size"]), device)
    return promised(case, plan)[1]


def replanned(result: dict[str, Any]) -> dict[str, Any]:
    """The result with today's predictions."""
    hardware = result["hardware"]
    device = named_by_driver(hardware["name"], hardware["accelerator_memory_bytes"], GPUS)
    with tempfile.TemporaryDirectory() as scratch:
        entries = Path(scratch) / "calibration.json"
        entries.write_text(json.dumps(result["calibration"]), encoding="utf-8")
        os.environ["TUNESMITH_CALIBRATION"] = str(entries)
        rows = [{**row, **predicted(case_of(row), device)} for row in result["rows"]]
    return {**result, "claims": claims_of(rows), "rows": rows}


def main() -> None:
    """Rewrite the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("result", type=Path)
    path = options.parse_args().result
    made = replanned(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for entry in made["claims"]:
        print(f"{entry['name']:<48} {entry['value']:.6g} {entry['unit']}")


if __name__ == "__main__":
    main()
