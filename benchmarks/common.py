"""What every benchmark writes: hardware, versions, claims and rows."""

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
    """A parser with the option that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=result_file, metavar="FILE", help="write the result to this file")
    return made


def processor() -> str:
    """The processor's name with what tells its generation, as names on rented machines do not."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    found = (re.search(rf"^{label}\s*:\s*(\d+)", text, re.MULTILINE) for label in ("cpu family", "model"))
    told = [f"{label} {match[1]}" for label, match in zip(("family", "model"), found, strict=True) if match]
    return ", ".join([cpu_name(), *told])


def result_file(text: str) -> Path:
    """A path whose earlier result, if there is one, is of this processor: parts of two do not go into one file."""
    path = Path(text)
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))["hardware"].get("processor")
        if earlier is not None and not processor().startswith(earlier):
            raise argparse.ArgumentTypeError(f"{path} was measured on {earlier}, and this is {processor()}: name another file")
    return path


def claim(name: str, value: float, unit: str) -> dict[str, Any]:
    """One number that a document may quote."""
    return {"name": name, "value": value, "unit": unit}


def in_turn(theirs: Callable[[], Any], ours: Callable[[], Any], calls: int) -> list[tuple[float, float]]:
    """Seconds of both for calls that follow each other, after two that do not count."""
    taken: list[tuple[float, float]] = []
    for _ in range(calls + 2):
        begun = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        taken.append((between - begun, time.perf_counter() - between))
    return taken[2:]


def merged(path: Path | None, claims: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """The claims and rows with those that an earlier result has beside them: of other names, and of other parts."""
    if path is None or not path.is_file():
        return claims, rows
    earlier = json.loads(path.read_text(encoding="utf-8"))
    names, parts = {made["name"] for made in claims}, {row["part"] for row in rows}
    kept = [old for old in earlier["claims"] if old["name"] not in names]
    return [*kept, *claims], [*(old for old in earlier["rows"] if old["part"] not in parts), *rows]


def this_machine() -> dict[str, Any]:
    """What a result says of the machine that it was measured on. On a GPU this process has a CUDA context after it."""
    return {**detect().as_dict(), "processor": processor()}


def write_result(
    path: Path | None, claims: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write everything to `path` if one is given; `more` are other keys of the file, `hardware` too where it is known."""
    if path is not None:
        hardware = more.pop("hardware", None) or this_machine()
        result = {"hardware": hardware, "versions": installed_versions(), "claims": claims, "rows": rows, **more}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def report(path: Path | None, claims: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print the claims, and write everything."""
    for entry in claims:
        print(f"{entry['name']:<48} {entry['value']:.6g} {entry['unit']}")
    write_result(path, claims, rows, **more)
