"""The GPU benchmark script runs on a machine without a GPU, and its figures match their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, script_of
from tests.support.forked import ran

GPU = ROOT / "benchmarks" / "gpu"
GIB = 2**30


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/gpu/run.py."""
    return script_of(GPU / "run.py", GPU, GPU.parent)


def run(*arguments: str, result: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [str(GPU / "run.sh"), *arguments, "--json", str(result)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done, json.loads(result.read_text(encoding="utf-8"))


def cell(case: str, *more: str) -> dict[str, Any]:
    """The answer of cell.py, with which run.py measures each case."""
    done = ran("cell", [case, "--dry-run", *more], path=[GPU, GPU.parent], TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", ["sharing_7b", "stock_lora_7b"])
def test_a_case_is_measured_and_planned(case: str) -> None:
    found = cell(case)
    assert found["part"] == case
    assert found["peak_memory_bytes"] > 0
    assert found["planned_bytes"] > 0
    assert found["losses"][0] == pytest.approx(6.24, abs=0.1)  # log 512: nothing has been learnt yet


def test_a_case_calibrates_the_plan() -> None:
    (entry, *_) = cell("lora_7b", "--calibrate")["calibration"]
    assert entry["method"] == "lora"


@pytest.mark.slow
def test_a_dry_run_measures_and_plans(tmp_path: Path, generator: ModuleType) -> None:
    """The engine on rows with a shared prefix, and stock LoRA: the same first loss, prefix computed once, a plan for each."""
    only = ("--only", "sharing_7b", "--only", "stock_lora_7b")
    done, result = run("--dry-run", *only, result=tmp_path / "dry.json")
    assert done.returncode == 0, done.stderr
    assert result["kind"] == "dry run"
    assert result["left_out"] == []
    ours, stock = result["rows"]
    assert [ours["part"], stock["part"]] == ["sharing_7b", "stock_lora_7b"]
    for row in (ours, stock):
        assert row["peak_memory_bytes"] > 0
        assert row["planned_seconds"] != row["roofline_seconds"]  # calibrated first
        assert row["losses"][0] == pytest.approx(6.24, abs=0.1)  # log 512: nothing has been learnt yet
    table = "\n".join(generator.gpu_measured(result))
    assert "stock LoRA | 1 x 32 |" in table
    assert f"| tunesmith | {ours['rows_per_second']:.1f} |" in table


def test_what_fails_is_named(tmp_path: Path) -> None:
    """Too little time for any case."""
    done, result = run("--dry-run", "--only", "lora_7b", "--minutes", "0.05", result=tmp_path / "late.json")
    assert done.returncode == 1
    assert result["rows"] == []
    assert result["left_out"] == [{"part": "lora_7b", "reason": "no time was left"}]


def test_an_unknown_card_is_named(tmp_path: Path) -> None:
    done, result = run("--trace", "H1000000", "--only", "lora_7b", result=tmp_path / "unknown.json")
    assert done.returncode == 1
    assert result["left_out"][0]["part"] == "lora_7b"
    assert "unknown GPU" in done.stderr


def row(part: str, tables: list[int], **values: float) -> dict[str, Any]:
    return {"part": part, "tables": tables, **values}


def test_claims_are_what_they_are_called(script: ModuleType) -> None:
    plan = {"planned_bytes": 8.4 * GIB, "planned_seconds": 0.9, "seconds_per_step": 1.0}
    rows = [
        row("qlora_7b", [2, 3], peak_memory_bytes=8 * GIB, tokens_per_second=3000.0, **plan),
        row("lora_7b_fast", [2, 3], peak_memory_bytes=10 * GIB, tokens_per_second=20_000.0, **plan),
        row("qlora_7b_fast", [2, 3], peak_memory_bytes=8 * GIB, tokens_per_second=18_000.0, **plan),
        row("sharing_7b", [4], rows_per_second=30.0),
        row("sharing_7b_trl_padded", [4], rows_per_second=5.0),
        row("sharing_7b_trl_packed", [4], rows_per_second=6.0),
    ]
    values = {claim["name"]: claim["value"] for claim in script.claims_of(rows)}
    assert values == {
        "qlora_7b_peak_gib": 8,
        "lora_7b_tokens_per_second": 20_000,
        "qlora_7b_tokens_per_second": 18_000,
        "qlora_to_lora_speed_ratio": pytest.approx(0.9),
        "plan_memory_max_error_percent": pytest.approx(16),  # of the second row, below the measurement
        "plan_memory_under_max_percent": pytest.approx(16),
        "plan_time_max_error_percent": pytest.approx(10),
        "prefix_sharing_rows_per_second_ratio": 5,
    }
    assert script.claims_of(rows[3:4]) == []
