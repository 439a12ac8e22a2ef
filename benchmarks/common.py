"""The result format of every benchmark: hardware, versions, claims and rows."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.hardware import cpu_name, detect
from tunesmith.runs import installed_versions


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=result_file, metavar="FILE", help="write the result to this file")
    return made


def processor() -> str:
    """The processor's name, family and model; names on rented machines do not identify the generation."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    found = (re.search(rf"^{label}\s*:\s*(\d+)", text, re.MULTILINE) for label in ("cpu family", "model"))
    told = [f"{label} {match[1]}" for label, match in zip(("family", "model"), found, strict=True) if match]
    return ", ".join([cpu_name(), *told])


def result_file(text: str) -> Path:
    """A path; an earlier result there must be from this processor, since one file never mixes two processors."""
    path = Path(text)
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))["hardware"].get("processor")
        if earlier is not None and not processor().startswith(earlier):
            raise argparse.ArgumentTypeError(f"{path} was measured on {earlier}, and this is {processor()}: name another file")
    return path


def claim(name: str, value: float, unit: str) -> dict[str, Any]:
    """One number that documents may quote."""
    return {"name": name, "value": value, "unit": unit}


def in_turn(theirs: Callable[[], Any], ours: Callable[[], Any], calls: int) -> list[tuple[float, float]]:
    """Seconds of both for calls in alternation, after two warm-up calls that are not counted."""
    taken: list[tuple[float, float]] = []
    for _ in range(calls + 2):
        begun = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        taken.append((between - begun, time.perf_counter() - between))
    return taken[2:]


def merged(path: Path | None, claims: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """The claims and rows, plus those of an earlier result that have other names or belong to other parts."""
    if path is None or not path.is_file():
        return claims, rows
    earlier = json.loads(path.read_text(encoding="utf-8"))
    names, parts = {made["name"] for made in claims}, {row["part"] for row in rows}
    kept = [old for old in earlier["claims"] if old["name"] not in names]
    return [*kept, *claims], [*(old for old in earlier["rows"] if old["part"] not in parts), *rows]


def this_machine() -> dict[str, Any]:
    """What a result records about its machine. On a GPU, this process has a CUDA context afterwards."""
    return {**detect().as_dict(), "processor": processor()}


def write_result(
    path: Path | None, claims: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write everything to `path` if it is given; `more` adds keys to the file, including `hardware` if it is known."""
    if path is not None:
        hardware = more.pop("hardware", None) or this_machine()
        result = {"hardware": hardware, "versions": installed_versions(), "claims": claims, "rows": rows, **more}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def report(path: Path | None, claims: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print the claims and write everything."""
    for entry in claims:
        print(f"{entry['name']:<48} {entry['value']:.6g} {entry['unit']}")
    write_result(path, claims, rows, **more)
