"""`--calibrate`: runs real engine steps on this machine, in about a minute.

If a step of the whole model is short enough, it runs as it is. Otherwise a copy with two blocks and one with eight are timed;
the difference of six blocks gives the time per block and of the rest. On a CPU the extrapolation is low by up to a third,
because a few blocks stay in its caches. Weights are random, since time does not depend on them; rows come from the data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.optim.adamw import gradient_norm
from tunesmith.engine.packing.batch import Batch, PaddedCollator, StepCollator, collate_tree, to_device
from tunesmith.engine.packing.tree import Limits
from tunesmith.hardware.allocators import steady_memory
from tunesmith.hardware.calibration import ROOFLINE, Entry, add_entries, today
from tunesmith.hardware.catalogue import Device
from tunesmith.models.catalogue import find_config
from tunesmith.models.families import read_architecture
from tunesmith.models.load import make_config, quiet
from tunesmith.planner.datafacts import DataFacts, Row
from tunesmith.planner.options import Option, Planner, mean_batch, roofline_step
from tunesmith.planner.plan import calibration_file
from tunesmith.planner.tracing.building import build_model, make_optimizer
from tunesmith.recipe import Method, Recipe

DEPTHS = (2, 8)
_ROUNDS = (4, 16)  # minimum and maximum timed steps of each copy, alternating; as many as fit into this time
_SECONDS = 4.0
_SHORT = 8.0  # maximum roofline seconds per step for which the whole model runs


def calibrate(
    recipe: Recipe, facts: DataFacts, device: Device, methods: Sequence[Method], console: Console, *, free: bool = True
) -> list[Entry]:
    """Measure each method's step on this machine and store the ratio to the roofline for later plans.

    `free` takes micro-batch and levers from the plan, else they come from the recipe.
    """
    quiet()
    if device.kind == "cpu":
        steady_memory()
    values, source = find_config(recipe.model, recipe.revision)
    architecture = read_architecture(values, source)
    planner = Planner(architecture, recipe, facts, device, [])
    entries = []
    for method in methods:
        option = planner.best(method, free=free)
        size = option.settings.per_device_train_batch_size
        most = Limits(option.settings.per_device_max_tokens, None, option.settings.micro_batch_start)
        rows = [side for row in facts.draw(size)[0] for side in row.sides]
        measured = step_seconds(values, option, rows, packing=planner.packing, device=device)
        mean = sum(len(row.ids) for row in rows) / len(rows)
        computed = planner.batches(size, most)[0]
        typical = mean_batch([computed])
        # The calibration step uses cross-entropy, which makes logits once.
        scenario = replace(option.scenario, length=typical.tokens, labelled=typical.labelled, logits_twice=False)
        predicted = roofline_step(architecture, scenario, device, len(computed), mean)
        ratio = measured / predicted.seconds
        console.print(f"calibrate {method}: {size} rows in {measured:.3g} s, {ratio:.2f} x the roofline", soft_wrap=True)
        width = architecture.hidden_size
        dtype = option.settings.compute_dtype
        entries.append(
            Entry(
                device.name,
                torch.__version__,
                today(),
                "probe",
                method,
                dtype,
                width,
                ratio,
                roofline=ROOFLINE,
                bound=predicted.bound,
            )
        )
    if not add_entries(calibration_file(), entries):
        console.print(f"calibrate: {calibration_file()} cannot be written, so later plans will not use it", soft_wrap=True)
    return entries


def step_seconds(values: dict[str, Any], option: Option, rows: Sequence[Row], *, packing: bool, device: Device) -> float:
    """Seconds of forward, backward and update of the whole model, measured or extrapolated from two shallow copies."""
    layers = int(values.get("num_hidden_layers") or values["num_layers"])
    whole = option.roofline_seconds <= _SHORT and option.safe_memory_bytes <= device.memory_bytes / 2
    where = torch.device("cuda" if device.kind == "cuda" else "cpu")
    depths = (layers,) if whole or layers <= DEPTHS[-1] else DEPTHS
    steps = [_stepper(values, depth, option, rows, packing=packing, where=where) for depth in depths]
    times: list[list[float]] = [[] for _ in depths]
    for step in steps:  # warmup: the first step allocates memory and compiles kernels
        step()
    began, (least, most) = time.perf_counter(), _ROUNDS
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() - began < _SECONDS):
        for number, step in enumerate(steps):
            begun = time.perf_counter()
            step()
            times[number].append(time.perf_counter() - begun)
    medians = [statistics.median(each) for each in times]
    if len(depths) == 1:
        return medians[0]
    block = max(0.0, (medians[1] - medians[0]) / (depths[1] - depths[0]))
    return medians[0] + (layers - depths[0]) * block


def _stepper(
    values: dict[str, Any], depth: int, option: Option, rows: Sequence[Row], *, packing: bool, where: torch.device
) -> Callable[[], None]:
    """One training step of a copy with `depth` blocks, as a function that can be called repeatedly."""
    config = make_config(values, num_hidden_layers=depth, layer_types=None)
    torch.manual_seed(0)
    scenario = replace(option.scenario, attention="tree") if packing else option.scenario
    model = build_model(config, scenario, str(where))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, option.scenario)
    most = Limits(option.settings.per_device_max_tokens, None, option.settings.micro_batch_start)
    batches = [to_device(batch, where) for batch in _collate(rows, config.vocab_size, most, packing=packing)]

    def step() -> None:
        for batch in batches:
            summed_loss(model, batch).backward()
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, gradient_norm(trained))
        optimizer.step()
        optimizer.zero_grad()
        if where.type == "cuda":
            torch.cuda.synchronize()

    return step


def _collate(rows: Sequence[Row], vocabulary: int, limits: Limits, *, packing: bool) -> list[Batch]:
    """The rows as micro-batches, each row cut after its last label; its last tokens are labelled."""
    made = []
    for row in rows:
        length = len(row.computed) + 1
        ids = [token % vocabulary for token in row.ids[:length]]
        made.append({"input_ids": ids, "loss_mask": [place >= length - row.labelled for place in range(length)]})
    return StepCollator(collate_tree if packing else PaddedCollator(None), limits)(made)["micro_batches"]
