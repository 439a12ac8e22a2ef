"""Makes the plan: memory, time and cost of full fine-tuning, LoRA and QLoRA, the recommended one, and the rules behind it.

Nothing is loaded: the model's config.json, the row lengths and a table of GPUs are enough. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import get_args

from tunesmith.errors import ModelError, Problem
from tunesmith.hardware.calibration import Entry, read_entries
from tunesmith.hardware.catalogue import GIB, Device
from tunesmith.io.cache import cache_folder
from tunesmith.models import builtin
from tunesmith.models.architecture import Architecture
from tunesmith.models.catalogue import find_config
from tunesmith.models.families import read_architecture
from tunesmith.planner.bytes.step import offloaded_bytes
from tunesmith.planner.datafacts import DataFacts, Encoder, encoder_of
from tunesmith.planner.decide import LARGE_DATA, LARGE_MODEL, MANY_ROWS, Asks, Cluster, Reason, decide, meets, smallest_cluster
from tunesmith.planner.options import Option, Planner
from tunesmith.planner.result import Plan
from tunesmith.recipe import Method, Origin, Recipe, ResolvedRecipe

METHODS: tuple[Method, ...] = get_args(Method)


def calibration_file() -> Path:
    """Where measurements are stored for later plans: the file named by TUNESMITH_CALIBRATION, else one in the cache."""
    named = os.environ.get("TUNESMITH_CALIBRATION")
    return Path(named).expanduser() if named else cache_folder() / "calibration.json"


def plan_for(
    recipe: Recipe,
    facts: DataFacts,
    device: Device,
    gpus: Mapping[str, Device],
    *,
    methods: Sequence[Method] = METHODS,
    asks: Asks = Asks(),
    free: bool = True,
    fixed: Collection[str] = (),
    entries: Sequence[Entry] | None = None,
) -> Plan:
    """The plan of a recipe on a device.

    `free` lets micro-batch and levers vary, except for the keys in `fixed`; else the recipe's values are used as they are.
    """
    if recipe.train.shifted_sparse_attention is not None:
        what, why = "train.shifted_sparse_attention cannot be planned", "its memory and time differ from full attention's"
        raise ModelError(Problem("TS703", what, "recipe", why, "remove it to plan for full attention"))
    values, source = find_config(recipe.model, recipe.revision)
    architecture = read_architecture(values, source)
    known = read_entries(calibration_file()) if entries is None else entries
    planner = Planner(architecture, recipe, facts, device, known, fixed)
    options = {method: planner.best(method, free=free) for method in methods}
    recommended, reasons = decide(options, architecture, facts, device, asks)
    clusters = _clusters(options, architecture, device, gpus)
    reasons += _of_size(architecture, facts, clusters, recommended)
    if device.count > 1:
        text = f"times and costs are for one of the {device.count} cards: jobs on several are not planned yet"
        reasons.append(Reason("one-card", "tunesmith", text))
    if recipe.train.activation_offloading:
        text = "activation_offloading is not modelled: the peak will be lower than planned, and a step longer"
        reasons.append(Reason("offloading-not-counted", "tunesmith", text))
    if recipe.train.optimizer_offloading:
        largest = max(offloaded_bytes(architecture, option.scenario) for option in options.values())
        text = f"optimizer_offloading needs up to {largest / GIB:.1f} GiB of host memory"
        reasons.append(Reason("optimizer-offloading", "tunesmith", text))
    elsewhere = _elsewhere(planner, options, gpus, asks, free=free)
    change = _what_would_change_it(planner, options, recommended, elsewhere, clusters, asks)
    return Plan(recipe.model, source, architecture, device, facts, options, recommended, reasons, change, clusters, elsewhere)


def _clusters(
    options: Mapping[Method, Option], architecture: Architecture, device: Device, gpus: Mapping[str, Device]
) -> dict[Method, Cluster]:
    """The smallest cluster for what does not fit on one device, or is large: of the given device, or of large cards."""
    large = [gpu for gpu in gpus.values() if gpu.memory_bytes >= 80 * GIB and gpu.compute_dtype == "bfloat16"]
    found = {}
    for method, option in options.items():
        if not option.fits or architecture.parameters > LARGE_MODEL:
            cluster = smallest_cluster(option, architecture, [device]) if device.count > 1 else None
            if cluster is None or cluster.count > device.count:
                cluster = smallest_cluster(option, architecture, large)
            if cluster is not None:
                found[method] = cluster
    return found


def _of_size(
    architecture: Architecture, facts: DataFacts, clusters: Mapping[Method, Cluster], recommended: Method | None
) -> list[Reason]:
    """Reasons of a very large model or data set: several devices, and the minimum number if memory requires it."""
    reasons = []
    if architecture.parameters > LARGE_MODEL:
        text = f"{architecture.parameters / 1e9:.0f} B parameters are more than 30 B: such a job is usually spread over devices"
        if recommended is None and "full" in clusters:
            cluster = clusters["full"]
            text += f"; full takes at least {cluster.count} x {cluster.device} with {cluster.sharding} (not yet built in)"
        reasons.append(Reason("large-model", "common practice", text))
    if facts.rows >= LARGE_DATA:
        text = f"{facts.rows:,} rows are a very large set: data parallelism over several devices divides the hours"
        reasons.append(Reason("large-data", "common practice", text))
    return reasons


def _elsewhere(
    planner: Planner, options: Mapping[Method, Option], gpus: Mapping[str, Device], asks: Asks, *, free: bool
) -> dict[Method, tuple[Device, Option]]:
    """For each method unusable on the device, its option on the cheapest card where it is usable: planned, not guessed."""
    found: dict[Method, tuple[Device, Option]] = {}
    cards = [gpu for gpu in gpus.values() if gpu.flops["bfloat16"] and gpu.name != planner.device.name]
    for method, option in options.items():
        if meets(option, asks) or (method == "qlora" and asks.latency_critical):
            continue
        for gpu in sorted(cards, key=lambda gpu: (gpu.price, gpu.memory_bytes)):
            there = planner.on(gpu).best(method, free=free)
            if meets(there, asks):
                found[method] = (gpu, there)
                break
    return found


def _what_would_change_it(
    planner: Planner,
    options: Mapping[Method, Option],
    recommended: Method | None,
    elsewhere: Mapping[Method, tuple[Device, Option]],
    clusters: Mapping[Method, Cluster],
    asks: Asks,
) -> list[str]:
    """The cheapest card on which each unusable method works, or the smallest cluster; plan.json lists them too."""
    device, said = planner.device, list[str]()
    for method, option in options.items():
        cluster = clusters.get(method)
        if not option.fits and cluster is not None and cluster.device == device.name and cluster.count <= device.count:
            how = f"together, with {cluster.sharding}, which is not built in yet"
            said.append(f"{method} would fit on {cluster.count} of the {device.count} {device.name} {how}")
        elif method in elsewhere:
            card, there = elsewhere[method]
            takes = f"{there.hours:,.3g} h, ${there.cost:,.2f}"
            said.append(
                f"{method} fits on one {card.name} ({card.memory_bytes / GIB:.0f} GiB, ${card.price:.2f} an hour): {takes}"
            )
        elif not option.fits and cluster is not None:
            how = f"with {cluster.sharding}, which is not built in yet"
            said.append(f"{method} would take {cluster.count} x {cluster.device} (${cluster.price_an_hour:,.2f} an hour) {how}")
    if recommended == "lora" and "full" in options and options["full"].fits and planner.facts.rows < MANY_ROWS:
        said += [f"full would be recommended from {MANY_ROWS:,} rows on"] if asks == Asks() else []
    if recommended is None and not elsewhere and asks != Asks():
        said.append("no single card in the catalogue meets the limits")
    return said


def fixed_keys(resolved: ResolvedRecipe) -> set[str]:
    """Keys that the user set and that a plan does not change."""
    return {key for key, origin in resolved.origins.items() if origin in {"file", "override"}}


def with_settings(resolved: ResolvedRecipe, option: Option) -> ResolvedRecipe:
    """The recipe with an option's method and settings in place of `auto`; values set by the plan have the origin `plan`."""
    settings = option.as_dict()["settings"]
    train = {
        key: settings[key]
        for key in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "per_device_max_tokens",
            "gradient_checkpointing",
            "optim",
            "optimizer_in_backward",
            "learning_rate",
        )
    }
    lora = {key: settings[key] for key in ("r", "lora_alpha") if key in settings}
    dumped = resolved.recipe.model_dump()
    changed = {**dumped, "method": option.method, "train": dumped["train"] | train, "lora": dumped["lora"] | lora}
    origins: dict[str, Origin] = dict(resolved.origins)
    names = {
        "method": option.method,
        **{f"train.{k}": v for k, v in train.items()},
        **{f"lora.{k}": v for k, v in lora.items()},
    }
    for name, value in names.items():
        section, _, key = name.rpartition(".")
        if (dumped[section][key] if section else dumped[key]) != value or (name == "method" and origins[name] == "default"):
            origins[name] = "plan"
    return ResolvedRecipe(recipe=Recipe.model_validate(changed), origins=origins)


def encoder_for(model: str) -> Encoder | None:
    """The model's own tokenizer if its folder is local, else None; nothing is downloaded."""
    folder = builtin.place() if model == builtin.NAME else Path(model).expanduser()
    return encoder_of(folder)
