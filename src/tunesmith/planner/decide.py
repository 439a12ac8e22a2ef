"""Chooses a method and names the rules behind it: common practice next to the exact answer.

*Common practice* is what fine-tuning guides agree on: memory as multiples of the weights, settings by the number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tunesmith.engine.optim.sizes import COMPENSATED
from tunesmith.hardware.catalogue import GIB, Device
from tunesmith.models.architecture import Architecture
from tunesmith.planner.bytes.step import sharded_bytes
from tunesmith.planner.datafacts import DataFacts
from tunesmith.planner.options import OVERHEAD, Option
from tunesmith.recipe import Method

#: The usual rule of thumb: the least ratio of device memory to fp16 weights for each method.
MULTIPLES: dict[Method, float] = {"full": 4.0, "lora": 1.5, "qlora": 0.5}

#: Expected score relative to full fine-tuning, until `compare` has measured it. A rule of thumb.
EXPECTED_QUALITY: dict[Method, float] = {"full": 1.0, "lora": 0.99, "qlora": 0.98}

FEW_ROWS = 1_000  # below: expand the data first (common practice)
MANY_ROWS = 100_000  # from here on full fine-tuning is worth its cost if it fits (ours)
LARGE_DATA = 1_000_000  # from here on a job is spread over devices (common practice for "very large"; the number is ours)
LARGE_MODEL = 30e9  # parameters above which a job is spread over devices (common practice)

#: Device counts to try for a cluster.
_CLUSTERS = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Asks:
    """What the user asked for: maximum dollars, maximum hours, and whether serving is latency-critical."""

    budget: float | None = None
    hours: float | None = None
    latency_critical: bool = False


@dataclass(frozen=True)
class Reason:
    """One rule that affected the answer: its stable name, its source, and what it says here."""

    rule: str
    source: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """A JSON value."""
        return {"rule": self.rule, "source": self.source, "text": self.text}


def rule_of_thumb(architecture: Architecture, device: Device, methods: Collection[Method] = get_args(Method)) -> Method | None:
    """The largest method whose multiple of the fp16 weights fits in one device's memory."""
    ratio = device.memory_bytes / (2 * architecture.parameters)
    return next((method for method in get_args(Method) if method in methods and ratio >= MULTIPLES[method]), None)


def decide(
    options: Mapping[Method, Option], architecture: Architecture, facts: DataFacts, device: Device, asks: Asks
) -> tuple[Method | None, list[Reason]]:
    """The recommended method (None if nothing fits), and the rules behind it in order of application."""
    reasons = _of_the_data(facts)
    reasons.append(_of_memory(options, architecture, device))
    usable = {method: option for method, option in options.items() if option.fits}
    for method, option in list(usable.items()):
        refused = _refused(option, asks)
        if refused is not None:
            reasons.append(refused)
            del usable[method]
    if not usable:
        return None, reasons
    chosen, reason = _choose(usable, facts)
    reasons.append(reason)
    reasons += _of_settings(options[chosen], facts)
    return chosen, reasons


def _of_the_data(facts: DataFacts) -> list[Reason]:
    if facts.rows >= FEW_ROWS:
        return []
    text = f"{facts.rows:,} rows are fewer than {FEW_ROWS:,}: expand the data first; it matters more than the method"
    return [Reason("few-rows", "common practice", text)]


def _of_memory(options: Mapping[Method, Option], architecture: Architecture, device: Device) -> Reason:
    """What fits by the rule of thumb and by the computed bytes; the recommendation is made elsewhere."""
    weights = 2 * architecture.parameters
    thumb = rule_of_thumb(architecture, device, options)
    exact = next((method for method in get_args(Method) if method in options and options[method].fits), None)
    text = f"{device.memory_bytes / GIB:.1f} GiB is {device.memory_bytes / weights:.1f} x the fp16 weights "
    text += f"({weights / GIB:.1f} GiB). Methods that fit by the rule of thumb (full from 4 x, LoRA from 1.5 x, QLoRA from 0.5 "
    text += f"x): {_and_smaller(thumb, options)}; by the computed bytes, which decide: {_and_smaller(exact, options)}"
    return Reason("memory-multiples", "common practice", text)


def _and_smaller(richest: Method | None, options: Mapping[Method, Option]) -> str:
    """A method and those that need less memory."""
    if richest is None:
        return "none"
    order = [method for method in get_args(Method) if method in options]
    return ", ".join(order[order.index(richest) :])


def _refused(option: Option, asks: Asks) -> Reason | None:
    """Why a method that fits is excluded, or None."""
    if option.method == "qlora" and asks.latency_critical:
        text = "serving is latency-critical: not QLoRA, whose 4-bit base is dequantised in every matmul"
        return Reason("latency-critical", "common practice", text)
    if asks.budget is not None and option.cost > asks.budget:
        return Reason("budget", "asked", f"{option.method} costs ${option.cost:,.2f}, more than ${asks.budget:,.2f}")
    if asks.hours is not None and option.hours > asks.hours:
        return Reason("deadline", "asked", f"{option.method} takes {option.hours:,.3g} h, more than {asks.hours:,.3g} h")
    return None


def meets(option: Option, asks: Asks) -> bool:
    """Whether an option fits and meets what was asked for."""
    return option.fits and _refused(option, asks) is None


#: The rules that choose a method; every recommendation has exactly one of them among its reasons.
MANY, ADAPTER, FOUR_BIT, FULL = CHOICES = ("many-rows", "adapter-is-enough", "only-four-bit-is-left", "only-full-is-left")


def _choose(usable: Mapping[Method, Option], facts: DataFacts) -> tuple[Method, Reason]:
    """Full for very many rows; else LoRA if it fits; QLoRA if only that fits."""
    if "full" in usable and facts.rows >= MANY_ROWS:
        text = f"{facts.rows:,} rows are enough to train every weight, and full fine-tuning fits"
        return "full", Reason(MANY, "tunesmith", text)
    if "lora" in usable:
        text = f"LoRA is expected to reach {100 * EXPECTED_QUALITY['lora']:.0f} % of full fine-tuning's score"
        if "full" in usable:
            least = [f"{usable[method].least_memory_bytes / GIB:.1f}" for method in ("lora", "full")]
            text += f"; it takes at least {least[0]} GiB, and full {least[1]} GiB"
            text += "; `tunesmith run --methods full,lora` measures both on your data"
        return "lora", Reason(ADAPTER, "tunesmith", text)
    if "qlora" in usable:
        text = "only QLoRA is left: the base model in 4 bits, the adapter trained as in LoRA"
        return "qlora", Reason(FOUR_BIT, "common practice", text)
    return "full", Reason(FULL, "tunesmith", "only full fine-tuning is left")


def _of_settings(option: Option, facts: DataFacts) -> list[Reason]:
    """The rules behind the settings, and the levers that were needed."""
    chosen = option.settings
    reasons = [
        Reason("learning-rate", "common practice", f"learning rate {chosen.learning_rate:g}: {chosen.reasons['learning_rate']}")
    ]
    if option.method != "full":
        ours = chosen.reasons["r"] != "recipe" and 10_000 <= facts.rows < MANY_ROWS
        source = "tunesmith" if ours else "common practice"
        reasons.append(Reason("rank-by-rows", source, f"r {chosen.r}: {chosen.reasons['r']}; alpha {chosen.lora_alpha}"))
    batch = f"{chosen.effective_batch_size} rows per step: {chosen.reasons['effective_batch_size']}"
    reasons.append(Reason("batch", "common practice", f"{batch}, in micro-batches of {chosen.per_device_train_batch_size}"))
    rising = f"the learning rate warms up over the first {chosen.warmup_steps:,}"
    reasons.append(
        Reason("epochs", "common practice", f"{chosen.num_train_epochs:g} epochs are {chosen.max_steps:,} steps; {rising}")
    )
    if option.lever.gradient_checkpointing:
        what = "activations" if option.lever.gradient_checkpointing is True else "activations, except those of attention,"
        text = f"{what} are recomputed in the backward pass, to fit in memory or to allow a larger micro-batch"
        reasons.append(Reason("checkpointing", "tunesmith", text))
    if option.lever.optim != "adamw":
        exact = option.lever.optim in COMPENSATED
        kept = "with Kahan compensation of the weights" if exact else "with stochastic rounding of the weights"
        text = f"compact optimizer states ({option.lever.optim}), {kept}: float32 master weights do not fit"
        reasons.append(Reason("small-states", "tunesmith", text))
    return reasons


@dataclass(frozen=True)
class Cluster:
    """Devices that share a job: which, how many, the ZeRO stage, and the peak memory of one of them."""

    device: str
    count: int
    stage: int
    peak_memory_bytes: int
    price_an_hour: float

    @property
    def sharding(self) -> str:
        """How the states are sharded."""
        return f"ZeRO-{self.stage}" + (" or FSDP full shard" if self.stage == 3 else "")

    def as_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "device": self.device,
            "count": self.count,
            "sharding": self.sharding,
            "peak_memory_bytes": self.peak_memory_bytes,
            "price_an_hour": self.price_an_hour,
        }


def smallest_cluster(option: Option, architecture: Architecture, devices: Sequence[Device]) -> Cluster | None:
    """The fewest equal devices that hold an option's step together, then the cheapest; None if 128 are not enough."""
    found: list[Cluster] = []
    for device in devices:
        over = OVERHEAD[device.kind]
        for count in _CLUSTERS:
            for stage in (1, 2, 3):
                allocated = sharded_bytes(architecture, option.scenario, count, stage)
                peak = round(allocated * over.safe_share + over.safe_bytes)
                if peak <= device.memory_bytes:
                    found.append(Cluster(device.name, count, stage, peak, count * device.price))
                    break
            if found and found[-1].device == device.name:
                break
    return min(found, key=lambda cluster: (cluster.count, cluster.price_an_hour), default=None)
