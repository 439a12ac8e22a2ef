"""The plan stage: predicts what a run will take (plan.json), and scores the prediction (score.json)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.hardware.calibration import ROOFLINE, Entry, add_entries, today
from tunesmith.hardware.catalogue import Device, read_gpus, this_device
from tunesmith.io.atomic import commit_folder, read_json, sha256_json, write_json, write_text
from tunesmith.planner.datafacts import prepared_facts, refuse_unplanned
from tunesmith.planner.options import OVERHEAD
from tunesmith.planner.plan import calibration_file, plan_for, with_settings
from tunesmith.planner.result import Plan
from tunesmith.recipe import ResolvedRecipe, dump_recipe
from tunesmith.runs import Run, installed_versions

#: The kind that a plan folder is committed as.
PLAN = "plan"


def write_plan(plan: Plan, resolved: ResolvedRecipe, folder: Path) -> None:
    """Write plan.json, frontier.svg and, if there is a recommendation, the resolved recipe.yaml into `folder`.

    Raises RunError if `folder` holds something else.
    """
    from tunesmith.planner.chart import frontier

    with commit_folder(folder, PLAN) as target:
        write_json(target / "plan.json", plan.as_dict())
        write_text(target / "frontier.svg", frontier(plan))
        if plan.recommended is not None:
            write_text(target / "recipe.yaml", dump_recipe(with_settings(resolved, plan.options[plan.recommended])))


def plan(run: Run, device: Device | None = None, gpus: Mapping[str, Device] | None = None) -> dict[str, Any]:
    """Predict what the run's own settings take on `device` (default: this machine's), into `plan/`; `score` checks it later.

    Returns plan.json's content; a no-op when recipe, data and device are unchanged. Raises RunError if `prepare` has not run.
    """
    recipe = run.recipe
    if recipe.method == "auto":
        raise AssertionError("a run's method is resolved before its folder is created")
    refuse_unplanned(recipe.objective)
    cards = read_gpus() if gpus is None else gpus
    here = this_device(cards) if device is None else device
    inputs = {
        "recipe": recipe.stage_digest("plan"),
        "data": run.outputs_digest("prepare"),
        "device": sha256_json([here.name, here.memory_bytes, here.count]),
    }
    if not run.is_current("plan", inputs):
        facts = prepared_facts(run.path / "data")
        made = plan_for(recipe, facts, here, cards, methods=(recipe.method,), free=False)
        with run.perform("plan", "plan", inputs) as target:
            write_json(target / "plan.json", made.as_dict())
    value: dict[str, Any] = read_json(run.path / "plan" / "plan.json")
    return value


def score(run: Run) -> dict[str, Any] | None:
    """Compare the plan with what `train` measured, into `score/`; None for a run without a plan of this recipe.

    Errors are in percent of the measurement. The measurement is kept for later plans on this device, once per training.
    """
    if "plan" not in run.status()["stages"] or run.outdated("plan") is not None:
        return None
    inputs = {"plan": run.outputs_digest("plan"), "train": run.outputs_digest("train")}
    if not run.is_current("score", inputs):
        planned, summary = read_json(run.path / "plan" / "plan.json"), read_json(run.path / "train" / "summary.json")
        promise = planned["methods"][0]
        with run.perform("score", "score", inputs) as target:
            write_json(target / "score.json", _scored(promise, summary))
        add_entries(calibration_file(), [_entry(planned, promise, summary)])
    value: dict[str, Any] = read_json(run.path / "score" / "score.json")
    return value


def _scored(promise: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    hours = {"promised": promise["hours"], "measured": summary["seconds"] / 3600}
    pairs = {
        "peak_memory_bytes": {"promised": promise["peak_memory_bytes"], "measured": summary["peak_memory_bytes"]},
        "seconds_per_step": {"promised": promise["seconds_per_step"], "measured": summary["seconds_per_step"]},
        "hours": hours,
    }
    return {
        name: pair | {"error_percent": 100 * (pair["promised"] / pair["measured"] - 1) if pair["measured"] else None}
        for name, pair in pairs.items()
    } | {
        "within_safe_memory": summary["peak_memory_bytes"] <= promise["safe_memory_bytes"],
        "within_safe_time": summary["seconds_per_step"] <= promise["safe_seconds_per_step"],
        "time_measurements": promise["time_measurements"],
    }


def _entry(planned: Mapping[str, Any], promise: Mapping[str, Any], summary: Mapping[str, Any]) -> Entry:
    """A run's measurement relative to the uncorrected predictions."""
    kind = planned["hardware"]["kind"]
    allocated = OVERHEAD[kind].grown(promise["allocated_bytes"], promise["breakdown"])
    unseen = OVERHEAD[kind].context_bytes  # PeakMemory counts the allocator's bytes
    return Entry(
        device=planned["hardware"]["name"],
        torch=installed_versions().get("torch", ""),
        date=today(),
        source="run",
        method=promise["method"],
        dtype=promise["settings"]["compute_dtype"],
        hidden_size=planned["model"]["hidden_size"],
        time=summary["seconds_per_step"] / promise["roofline_seconds_per_step"],
        bytes_beside=round(summary["peak_memory_bytes"] - allocated + unseen),
        roofline=ROOFLINE,
        bound=promise["bound"],
    )
