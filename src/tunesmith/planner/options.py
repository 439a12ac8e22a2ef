"""For one method on one device: the fastest settings that fit, with their memory, time and cost."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.engine.packing.tree import Limits
from tunesmith.hardware.calibration import Bound, Correction, Entry, bytes_beside, time_correction
from tunesmith.hardware.catalogue import GIB, Device
from tunesmith.methods.settings import Settings, settle
from tunesmith.models.architecture import Architecture
from tunesmith.models.families import runs_on_trees
from tunesmith.planner.bytes.step import Estimate, estimate, offloaded_bytes
from tunesmith.planner.datafacts import Batch, DataFacts
from tunesmith.planner.scenario import Attention, Optim, Scenario
from tunesmith.planner.speed import (
    HOST_BANDWIDTH,
    Times,
    forward_work,
    micro_batch_work,
    optimizer_bytes,
    optimizer_seconds,
    times,
)
from tunesmith.recipe import OBJECTIVES, Auto, Checkpointing, Method, Recipe


@dataclass(frozen=True)
class Overhead:
    """What a device needs beyond the allocated bytes: a share of them, and a fixed part that includes a GPU's context.

    `more` holds further shares, per part of the breakdown.
    """

    typical_share: float
    typical_bytes: int
    safe_share: float
    safe_bytes: int
    context_bytes: int = 0
    more: Mapping[str, float] = field(default_factory=dict)

    def grown(self, allocated: int, breakdown: Mapping[str, int]) -> float:
        """Bytes that grow with the step: allocated bytes, and what the allocator holds in addition."""
        return allocated * self.typical_share + sum(share * breakdown.get(kind, 0) for kind, share in self.more.items())

    def typical(self, allocated: int, breakdown: Mapping[str, int], beside: int | None = None) -> int:
        """The expected peak on the device; `beside` is the fixed part as measured by runs."""
        return round(self.grown(allocated, breakdown) + (self.typical_bytes if beside is None else max(0, beside)))

    def safe(self, allocated: int) -> int:
        """The peak that the device will not exceed."""
        return round(allocated * self.safe_share + self.safe_bytes)


#: GPU, measured on an H100: context and libraries 0.76 GiB, cuBLAS workspaces 0.06; expandable segments leave 0.05 to 0.2 GiB
#: unused. CPU: libraries and compiled GEMMs 95 MiB; malloc keeps a share of freed memory that does not fit the next request,
#: growing over some thirty steps, and all of a chunk of logits, whose size differs from step to step; gradients exist twice
#: while one is added to the other (benchmarks/process_memory.py).
_KEPT_BY_MALLOC = {"activations": 0.16, "scratch": 0.2, "logits": 1.05, "gradients": 1.1, "optimizer": 0.035}
OVERHEAD = {
    "cuda": Overhead(1.01, int(0.97 * GIB), 1.04, int(1.15 * GIB), int(0.76 * GIB)),
    "cpu": Overhead(1.0, 95 << 20, 1.25, int(0.6 * GIB), more=_KEPT_BY_MALLOC),
}

#: Micro-batch sizes to try if the recipe leaves the choice.
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Lever:
    """One configuration of a method, as recipe keys."""

    gradient_checkpointing: Checkpointing = False
    optim: Optim = "adamw"
    optimizer_in_backward: bool = False


_SMALL_STATES: tuple[tuple[Optim, bool], ...] = (
    ("adamw_kahan", False),
    ("adamw_8bit", False),
    ("adamw_8bit", True),
)
_RECOMPUTING: tuple[Checkpointing, ...] = ("keep_attention", True)
_EXACT_LEVERS = (Lever(), *(Lever(again) for again in _RECOMPUTING))
_SMALL_STATE_LEVERS = tuple(
    tuple(Lever(again, optim, in_backward) for again in _RECOMPUTING) for optim, in_backward in _SMALL_STATES
)


_LEVER_KEYS = ("gradient_checkpointing", "optim", "optimizer_in_backward")


@dataclass(frozen=True)
class Option:
    """A method with settings: its memory, time and cost, and whether it fits on the device."""

    method: Method
    fits: bool
    scenario: Scenario  # of the largest micro-batch
    memory: Estimate
    peak_memory_bytes: int
    safe_memory_bytes: int
    seconds_per_step: float
    safe_seconds_per_step: float
    steps: int
    settings: Settings
    lever: Lever
    cost_an_hour: float
    tokens_per_second: float
    time_measurements: int
    least_memory_bytes: int  # of this method and optimizer with micro-batches of one row and checkpointing, typical
    roofline_seconds: float  # per step, without corrections
    bound: Bound  # what limits such a step
    seconds_before: float  # of what the objective computes once, before the first step

    @property
    def hours(self) -> float:
        """Hours of training, including the work before the first step."""
        return (self.seconds_before + self.seconds_per_step * self.steps) / 3600

    @property
    def cost(self) -> float:
        """US dollars of training."""
        return self.hours * self.cost_an_hour

    def as_dict(self) -> dict[str, Any]:
        """The plan.json entry of a method."""
        chosen = self.settings
        return {
            "method": self.method,
            "fits": self.fits,
            "peak_memory_bytes": self.peak_memory_bytes,
            "safe_memory_bytes": self.safe_memory_bytes,
            "least_memory_bytes": self.least_memory_bytes,
            "allocated_bytes": self.memory.total_bytes,
            "breakdown": self.memory.breakdown,
            "seconds_per_step": self.seconds_per_step,
            "safe_seconds_per_step": self.safe_seconds_per_step,
            "roofline_seconds_per_step": self.roofline_seconds,
            "bound": self.bound,
            "seconds_before_first_step": self.seconds_before,
            "steps": self.steps,
            "hours": self.hours,
            "cost": self.cost,
            "tokens_per_second": self.tokens_per_second,
            "time_measurements": self.time_measurements,
            "settings": {
                "compute_dtype": chosen.compute_dtype,
                "per_device_train_batch_size": chosen.per_device_train_batch_size,
                "gradient_accumulation_steps": chosen.gradient_accumulation_steps,
                "per_device_max_tokens": "auto" if chosen.per_device_max_tokens is None else chosen.per_device_max_tokens,
                "gradient_checkpointing": self.lever.gradient_checkpointing,
                "optim": self.lever.optim,
                "optimizer_in_backward": self.lever.optimizer_in_backward,
                "learning_rate": chosen.learning_rate,
                "num_train_epochs": chosen.num_train_epochs,
                "max_steps": chosen.max_steps,
                "warmup_steps": chosen.warmup_steps,
                **({} if self.method == "full" else {"r": chosen.r, "lora_alpha": chosen.lora_alpha}),
            },
        }


class Planner:
    """Options for one model, data set and device; `fixed` names recipe keys that must not vary."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        facts: DataFacts,
        device: Device,
        entries: Sequence[Entry],
        fixed: Collection[str] = (),
    ) -> None:
        fixed = frozenset(fixed)
        self.a, self.recipe, self.facts, self.device, self.entries = architecture, recipe, facts, device, entries
        self.fixed = fixed
        own_attention = recipe.train.attn_implementation == "auto"
        self.packing = recipe.train.packing and own_attention and runs_on_trees(architecture.model_type)
        self._pairs = OBJECTIVES[recipe.objective].rows == "pair"  # the loss compares them with a reference model
        self._batches: dict[tuple[int, Limits], list[list[Batch]]] = {}

    def on(self, device: Device) -> Planner:
        """The same planner for another device; results computed from the data are shared."""
        other = copy.copy(self)
        other.device = device
        return other

    def best(self, method: Method, *, free: bool = True) -> Option:
        """The fastest settings that fit, or the closest if none fit. `free` lets micro-batch and levers vary.

        The first optimizer that fits is used, since those with smaller states are further from exact AdamW.
        """
        nearest: Option | None = None
        for group in self._levers(method, free=free):
            fitting: list[Option] = []
            for lever in group:
                for size in self._sizes(free=free):
                    option = self.option(method, size, lever)
                    if nearest is None or option.safe_memory_bytes < nearest.safe_memory_bytes:
                        nearest = option
                    if not option.fits:
                        break  # a larger micro-batch needs more memory
                    fitting.append(option)
            if fitting:
                return min(fitting, key=lambda option: (option.hours, option.safe_memory_bytes))
        if nearest is None:
            raise AssertionError("there is always a micro-batch of one row")
        return nearest

    def _levers(self, method: Method, *, free: bool) -> Iterator[tuple[Lever, ...]]:
        """Groups of levers, the exact optimizer first; each group has variants with and without recomputation."""
        asked = self.recipe.train
        own = Lever(asked.gradient_checkpointing, asked.optim, asked.optimizer_in_backward)
        if not free:
            yield (own,)
            return
        # Smaller states are for bf16 weights that are trained directly.
        small = () if method != "full" or self.device.compute_dtype == "float32" else _SMALL_STATE_LEVERS
        groups = [_EXACT_LEVERS, *small]
        allowed = [tuple(lever for lever in group if self._allowed(lever, own)) for group in groups]
        yield from [group for group in allowed if group] or [(own,)]

    def _allowed(self, lever: Lever, own: Lever) -> bool:
        """Whether a lever leaves every key that the recipe fixes unchanged."""
        asked = self.recipe.train
        one_micro_batch = asked.gradient_accumulation_steps in {"auto", 1} and asked.effective_batch_size == "auto"
        if lever.optimizer_in_backward and not one_micro_batch:
            return False
        if lever.gradient_checkpointing == "keep_attention" and self._attention() == "eager":
            return False
        return all(getattr(lever, name) == getattr(own, name) for name in _LEVER_KEYS if f"train.{name}" in self.fixed)

    def _sizes(self, *, free: bool) -> Sequence[int | Auto]:
        """Micro-batch sizes to try; only the recipe's own if it fixes rows or tokens per micro-batch."""
        if not free or self.fixed & {"train.per_device_train_batch_size", "train.per_device_max_tokens"}:
            return (self.recipe.train.per_device_train_batch_size,)
        return [size for size in SIZES if size <= self.facts.rows] or [1]

    def batches(self, size: int, limits: Limits) -> list[list[Batch]]:
        """`size` rows as micro-batches within the limits, in several draws; the last draw has the longest rows."""
        key = (size, limits)
        if key not in self._batches:
            self._batches[key] = self.facts.batches(size, limits, packing=self.packing)
        return self._batches[key]

    def settled(self, method: Method, size: int | Auto, lever: Lever) -> Settings:
        """The training settings with this micro-batch size; accumulation follows from the effective batch size."""
        train = self.recipe.train.model_copy(
            update={"per_device_train_batch_size": size, "optimizer_in_backward": lever.optimizer_in_backward}
        )
        recipe = self.recipe.model_copy(update={"method": method, "train": train})
        return settle(recipe, self.facts.rows, self.device.as_hardware())

    def option(self, method: Method, size: int | Auto, lever: Lever) -> Option:
        """The option for one choice of settings."""
        settings = self.settled(method, size, lever)
        limits = Limits(settings.per_device_max_tokens, None, settings.micro_batch_start)
        drawn = self.batches(settings.per_device_train_batch_size, limits)
        largest = max((batch for batches in drawn for batch in batches), key=lambda batch: batch.tokens)
        several = settings.gradient_accumulation_steps > 1 or any(len(batches) > 1 for batches in drawn)
        scenario = self._scenario(method, largest, settings, lever, accumulating=several)
        worst = estimate(self.a, scenario)
        typical = self._typical(scenario, worst)
        safe = max(OVERHEAD[self.device.kind].safe(worst.total_bytes), round(typical * 1.02))
        leanest = replace(lever, gradient_checkpointing=True)
        (one,) = self.batches(1, Limits())[-1]
        smallest = self._scenario(method, one, settings, leanest, accumulating=several)
        least = self._typical(smallest, estimate(self.a, smallest))
        step, measured = self._step_seconds(method, drawn, settings, lever)
        rows = statistics.fmean(sum(batch.row_tokens for batch in batches) for batches in drawn[:-1])
        rows *= settings.gradient_accumulation_steps
        return Option(
            method=method,
            fits=safe <= self.device.memory_bytes,
            scenario=scenario,
            memory=worst,
            peak_memory_bytes=typical,
            safe_memory_bytes=safe,
            seconds_per_step=step.seconds * measured.typical,
            safe_seconds_per_step=step.seconds * measured.safe,
            steps=settings.max_steps,
            settings=settings,
            lever=lever,
            cost_an_hour=self.device.price,
            tokens_per_second=rows / (step.seconds * measured.typical),
            time_measurements=measured.measurements,
            least_memory_bytes=min(least, typical),
            roofline_seconds=step.seconds,
            bound=step.bound,
            seconds_before=self._seconds_before(method, drawn, settings, lever) * measured.typical,
        )

    def _typical(self, scenario: Scenario, made: Estimate) -> int:
        """The expected peak on the device: allocated bytes, the allocator's share, and the context as measured by runs."""
        over = OVERHEAD[self.device.kind]
        beside = bytes_beside(self.entries, self.device.name, scenario.method)
        if beside is None and scenario.dtype == "bfloat16":
            beside = over.typical_bytes + self.device.product_bytes
        return over.typical(made.total_bytes, made.breakdown, beside)

    def _scenario(
        self, method: Method, batch: Batch, settings: Settings, lever: Lever, *, accumulating: bool = False
    ) -> Scenario:
        return Scenario(
            method=method,
            rows=1,
            length=batch.tokens,
            labelled=batch.labelled,
            dtype="bfloat16" if settings.compute_dtype == "bfloat16" else "float32",
            r=settings.r,
            gradient_checkpointing=lever.gradient_checkpointing,
            optim=lever.optim,
            optimizer_in_backward=lever.optimizer_in_backward,
            accumulating=accumulating,
            attention=self._attention(),
            logits_twice=self._pairs,
            modules_to_save=tuple(self.recipe.lora.modules_to_save),
            optimizer_offloading=self.recipe.train.optimizer_offloading,
        )

    def _attention(self) -> Attention:
        """The attention that the engine will run; flash kernels save the same tensors as sdpa."""
        if self.packing:
            return "tree" if self.device.kind == "cpu" else "flex"
        return "eager" if self.recipe.train.attn_implementation == "eager" else "sdpa"

    def _step_seconds(
        self, method: Method, drawn: Sequence[Sequence[Batch]], settings: Settings, lever: Lever
    ) -> tuple[Times, Correction]:
        """Roofline times of a step of mean micro-batches, and their correction from measurements."""
        scenario = self._scenario(method, mean_batch(drawn[:-1]), settings, lever)
        number = settings.gradient_accumulation_steps * statistics.fmean(map(len, drawn[:-1]))
        step = roofline_step(self.a, scenario, self.device, number, self.facts.mean_tokens)
        like = (self.entries, self.device.name, method, scenario.dtype, self.a.hidden_size)
        return step, corrected(step, time_correction(*like), time_correction(*like, "starting"))

    def _seconds_before(self, method: Method, drawn: Sequence[Sequence[Batch]], settings: Settings, lever: Lever) -> float:
        """Roofline seconds of the reference's forward pass over all pairs; 0 without a reference."""
        if not self._pairs:
            return 0.0
        scenario = self._scenario(method, mean_batch(drawn[:-1]), settings, lever)
        work = forward_work(self.a, scenario, estimate(self.a, scenario), self.facts.mean_tokens)
        pairs = settings.per_device_train_batch_size / statistics.fmean(map(len, drawn[:-1]))  # per micro-batch
        return self.facts.rows / pairs * times(work, self.device).seconds


def mean_batch(drawn: Sequence[Sequence[Batch]]) -> Batch:
    """The mean of all micro-batches."""
    every = [batch for batches in drawn for batch in batches]
    means = (statistics.fmean(getattr(batch, name) for batch in every) for name in ("tokens", "labelled", "row_tokens"))
    return Batch(*map(round, means))


def corrected(step: Times, computing: Correction, starting: Correction) -> Correction:
    """The correction of the whole step, from those of its two sides; the longer side after correction decides."""
    sides = ((step.computing, computing), (step.starting, starting))
    seconds, most = step.seconds, max(sides, key=lambda side: side[0] * side[1].typical)[1]
    typical, safe = (max(time * getattr(side, name) for time, side in sides) / seconds for name in ("typical", "safe"))
    return Correction(typical, safe, most.measurements)


def roofline_step(a: Architecture, scenario: Scenario, device: Device, micro_batches: float, context: float) -> Times:
    """Roofline times of an optimizer step, without corrections."""
    work = micro_batch_work(a, scenario, estimate(a, scenario), context)
    update = optimizer_seconds(optimizer_bytes(a, scenario), device)
    travel = 2 * offloaded_bytes(a, scenario) / HOST_BANDWIDTH
    each = times(work, device)
    return Times(micro_batches * each.computing + update + travel, micro_batches * each.starting)
