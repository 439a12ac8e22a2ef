"""Checks each sentence that a plan prints against plan.json, and against another plan if it is about other cards or rows.

A sentence that matches no pattern here fails the test, so every new sentence of the plan needs a check.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.hardware.catalogue import GIB, find_device, read_gpus
from tunesmith.planner.datafacts import assumed
from tunesmith.planner.decide import Asks
from tunesmith.planner.plan import plan_for
from tunesmith.planner.result import Plan
from tunesmith.planner.text import cells, heading, verdict
from tunesmith.recipe import parse_recipe

GPUS = read_gpus()
METHODS = ("full", "lora", "qlora")
SHARDING = r"(ZeRO-1|ZeRO-2|ZeRO-3 or FSDP full shard)"
#: The rule of thumb: the ratio of memory to fp16 weights from which a method is chosen.
MULTIPLES = {"full": 4.0, "lora": 1.5, "qlora": 0.5}

MODELS = (
    "HuggingFaceTB/SmolLM2-135M",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2-7B",
    "google/gemma-2-9b",
    "mistralai/Mixtral-8x7B",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B",
)
CARDS = ("24GB", "2xRTX 3090", "8xT4", "8xH100", "B200")
ASKS = (Asks(), Asks(hours=2.0), Asks(budget=5.0), Asks(latency_critical=True), Asks(hours=50.0, budget=300.0))
#: Each pair once, cycling through asks and rows.
PAIRS = [
    (model, card, ASKS[(a + b) % len(ASKS)], (10_000, 500, 120_000)[(a + 2 * b) % 3])
    for (a, model), (b, card) in itertools.product(enumerate(MODELS), enumerate(CARDS))
]


def planned(model: str, card: str, asks: Asks, rows: int) -> Plan:
    recipe = parse_recipe(f"model: {model}\ndata: {{train: rows.jsonl}}\n", "test", Path("/nowhere")).recipe
    return plan_for(recipe, assumed(rows, 1024), find_device(card, GPUS), GPUS, asks=asks, entries=[])


class Checks:
    """The references for a plan's text: plan.json, the request, and plans for other cards."""

    def __init__(self, model: str, card: str, asks: Asks, rows: int) -> None:
        self.asked = (model, card, asks, rows)
        self.model, self.card, self.asks, self.rows = self.asked
        self.plan = planned(*self.asked)
        self.told: dict[str, Any] = self.plan.as_dict()
        self.methods = {each["method"]: each for each in self.told["methods"]}
        self.hardware = self.told["hardware"]

    @property
    def chosen(self) -> dict[str, Any]:
        """Settings of the recommended method."""
        settings: dict[str, Any] = self.methods[self.told["recommended"]]["settings"]
        return settings

    def usable(self, method: str) -> bool:
        """Whether a method fits and meets the request."""
        each = self.methods[method]
        dear = self.asks.budget is not None and each["cost"] > self.asks.budget
        slow = self.asks.hours is not None and each["hours"] > self.asks.hours
        return each["fits"] and not dear and not slow and not (method == "qlora" and self.asks.latency_critical)

    def multiples(self, memory: str, ratio: str, weights: str, thumb: str, exact: str) -> None:
        assert memory == f"{self.hardware['memory_bytes'] / GIB:.1f}"
        fp16 = self.told["model"]["fp16_weight_bytes"]
        assert (ratio, weights) == (f"{self.hardware['memory_bytes'] / fp16:.1f}", f"{fp16 / GIB:.1f}")
        allowed = [m for m in METHODS if self.hardware["memory_bytes"] >= MULTIPLES[m] * fp16]
        assert thumb == (", ".join(allowed) or "none")
        assert self.told["rule_of_thumb"] == (allowed or [None])[0]
        fitting = [m for m in METHODS if self.methods[m]["fits"]]
        assert exact == (", ".join(fitting) or "none")

    def adapter(self, percent: str, lora: str | None, full: str | None) -> None:
        assert self.told["recommended"] == "lora"
        assert float(percent) == 100 * self.methods["lora"]["expected_quality"]
        assert (lora is not None) == self.usable("full")
        if lora is not None:
            least = [self.methods[m]["least_memory_bytes"] / GIB for m in ("lora", "full")]
            assert (lora, full) == (f"{least[0]:.1f}", f"{least[1]:.1f}")

    def batch(self, rows: str, seen: str, once: str) -> None:
        assert int(rows) == self.chosen["per_device_train_batch_size"] * self.chosen["gradient_accumulation_steps"]
        assert int(once) == self.chosen["per_device_train_batch_size"]
        assert int(seen) == round(self.rows * self.chosen["num_train_epochs"])

    def epochs(self, epochs: str, steps: str, warmup: str) -> None:
        rows = self.chosen["per_device_train_batch_size"] * self.chosen["gradient_accumulation_steps"]
        assert float(epochs) == self.chosen["num_train_epochs"]
        assert number(steps) == self.chosen["max_steps"] == self.methods[self.told["recommended"]]["steps"]
        assert abs(number(steps) * rows - self.rows * float(epochs)) <= rows * float(epochs)
        assert number(warmup) == self.chosen["warmup_steps"]

    def one_card(self, count: str) -> None:
        assert int(count) == self.hardware["count"] > 1
        alone = planned(self.model, self.hardware["name"], self.asks, self.rows)
        for method, option in alone.options.items():
            assert (self.methods[method]["hours"], self.methods[method]["cost"]) == (option.hours, option.cost)
            assert option.cost == pytest.approx(option.hours * self.hardware["price_an_hour"])

    def large(self, billions: str, count: str | None, device: str | None, sharding: str | None) -> None:
        assert float(billions) == round(self.told["model"]["parameters"] / 1e9) > 30
        if count is not None:
            assert self.told["recommended"] is None
            self.takes("full", count, device, sharding)

    def takes(self, method: str, count: str, device: str | None, sharding: str | None) -> None:
        cluster = self.methods[method]["distributed"]
        assert (cluster["count"], cluster["device"], cluster["sharding"]) == (int(count), device, sharding)
        assert cluster["peak_memory_bytes"] <= find_device(str(device), GPUS).memory_bytes
        assert not self.methods[method]["fits"] or self.told["model"]["parameters"] > 30e9

    def together(self, method: str, count: str, all_of: str, device: str, sharding: str) -> None:
        self.takes(method, count, device, sharding)
        assert (int(all_of), device) == (self.hardware["count"], self.hardware["name"])
        assert 1 < int(count) <= int(all_of)

    def cluster(self, method: str, count: str, device: str, price: str, sharding: str) -> None:
        self.takes(method, count, device, sharding)
        assert number(price) == pytest.approx(int(count) * find_device(device, GPUS).price, abs=0.005)

    def elsewhere(self, method: str, device: str, size: str, price: str, hours: str, cost: str) -> None:
        card = find_device(device, GPUS)
        assert (size, price) == (f"{card.memory_bytes / GIB:.0f}", f"{card.price:.2f}")
        there = Checks(self.model, device, self.asks, self.rows)
        assert there.usable(method)
        assert not self.usable(method)
        assert number(hours) == pytest.approx(there.methods[method]["hours"], rel=0.01)
        assert number(cost) == pytest.approx(there.methods[method]["cost"], abs=0.01)
        cheaper = [gpu.name for gpu in GPUS.values() if gpu.price < card.price and gpu.flops["bfloat16"]]
        for name in cheaper[:3]:
            assert not Checks(self.model, name, self.asks, self.rows).usable(method)

    def too_long(self, method: str, hours: str, most: str) -> None:
        assert self.asks.hours is not None
        assert number(most) == self.asks.hours < self.methods[method]["hours"]
        assert number(hours) == pytest.approx(self.methods[method]["hours"], rel=0.01)

    def too_dear(self, method: str, cost: str, most: str) -> None:
        assert self.asks.budget is not None
        assert number(most) == self.asks.budget < self.methods[method]["cost"]
        assert number(cost) == pytest.approx(self.methods[method]["cost"], abs=0.01)

    def alone(self, method: str) -> None:
        assert self.told["recommended"] == method
        assert [m for m in METHODS if self.usable(m)] == [method]

    def more_rows(self, rows: str) -> None:
        assert self.told["recommended"] == "lora"
        assert planned(self.model, self.card, self.asks, number(rows)).recommended == "full"

    def nowhere(self) -> None:
        for gpu in GPUS.values():
            if gpu.flops["bfloat16"]:
                assert not any(map(Checks(self.model, gpu.name, self.asks, self.rows).usable, METHODS)), gpu.name

    def many(self, rows: str) -> None:
        assert number(rows) == self.rows
        assert self.usable("full")
        assert self.told["recommended"] == "full"

    def few(self, rows: str, limit: str) -> None:
        assert number(rows) == self.rows < number(limit)

    def said(self, text: str) -> None:
        """Find the one pattern that matches a sentence and check it."""
        found = [(check, match) for pattern, check in PATTERNS if (match := re.fullmatch(pattern, text))]
        assert len(found) == 1, f"no pattern, or several, for: {text}"
        check, match = found[0]
        check(self, *match.groups())


def holds(value: object) -> None:
    assert value


def number(text: str) -> Any:
    """A number with commas."""
    return float(text) if "." in text else int(text.replace(",", ""))


N = r"([\d.,]+)"
PATTERNS: list[tuple[str, Callable[..., object]]] = [
    (
        rf"{N} GiB is {N} x the fp16 weights \({N} GiB\)\. Methods that fit by the rule of thumb \(full from 4 x, LoRA from "
        r"1\.5 x, QLoRA from 0\.5 x\): ([a-z, ]+); by the computed bytes, which decide: ([a-z, ]+)",
        Checks.multiples,
    ),
    (
        rf"LoRA is expected to reach {N} % of full fine-tuning's score(?:; it takes at least {N} GiB, and full {N} GiB; "
        r"`tunesmith run --methods full,lora` measures both on your data)?",
        Checks.adapter,
    ),
    (
        r"learning rate (\S+): default of (\w+)",
        lambda c, rate, method: holds((float(rate), method) == (c.chosen["learning_rate"], c.told["recommended"])),
    ),
    (
        r"r (\d+): (\d+) train rows; alpha (\d+)",
        lambda c, *n: holds(tuple(map(int, n)) == (c.chosen["r"], c.rows, c.chosen["lora_alpha"])),
    ),
    (r"(\d+) rows per step: (\d+) rows are seen in the run, in micro-batches of (\d+)", Checks.batch),
    (rf"(\S+) epochs are {N} steps; the learning rate warms up over the first {N}", Checks.epochs),
    (
        r"activations(?:, except those of attention,)? are recomputed in the backward pass, to fit in memory or to allow a "
        "larger micro-batch",
        lambda c: holds(c.chosen["gradient_checkpointing"]),
    ),
    (
        r"compact optimizer states \((\w+)\), .*: float32 master weights do not fit",
        lambda c, optim: holds(optim == c.chosen["optim"] != "adamw"),
    ),
    (
        rf"{N} B parameters are more than 30 B: such a job is usually spread over devices"
        rf"(?:; full takes at least (\d+) x (.+) with {SHARDING} \(not yet built in\))?",
        Checks.large,
    ),
    (r"times and costs are for one of the (\d+) cards: jobs on several are not planned yet", Checks.one_card),
    (rf"(\w+) takes {N} h, more than {N} h", Checks.too_long),
    (rf"(\w+) costs \${N}, more than \${N}", Checks.too_dear),
    (
        "serving is latency-critical: not QLoRA, whose 4-bit base is dequantised in every matmul",
        lambda c: holds(c.asks.latency_critical),
    ),
    ("only QLoRA is left: the base model in 4 bits, the adapter trained as in LoRA", lambda c: c.alone("qlora")),
    ("only full fine-tuning is left", lambda c: c.alone("full")),
    (rf"{N} rows are enough to train every weight, and full fine-tuning fits", Checks.many),
    (rf"{N} rows are fewer than {N}: expand the data first; it matters more than the method", Checks.few),
    (
        rf"(\w+) would fit on (\d+) of the (\d+) (.+) together, with {SHARDING}, which is not built in yet",
        Checks.together,
    ),
    (rf"(\w+) fits on one (.+) \({N} GiB, \${N} an hour\): {N} h, \${N}", Checks.elsewhere),
    (rf"(\w+) would take (\d+) x (.+) \(\${N} an hour\) with {SHARDING}, which is not built in yet", Checks.cluster),
    (rf"full would be recommended from {N} rows on", Checks.more_rows),
    ("no single card in the catalogue meets the limits", Checks.nowhere),
]


@pytest.mark.parametrize(
    ("model", "card", "asks", "rows"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (number % 2)) for number, pair in enumerate(PAIRS)],
    ids=lambda each: str(each).replace("/", "-")[:40],
)
def test_every_sentence_is_true(model: str, card: str, asks: Asks, rows: int) -> None:
    checks = Checks(model, card, asks, rows)
    plan, told = checks.plan, checks.told
    # The printed text equals plan.json's.
    printed = " ".join(line.strip() for line in verdict(plan))
    for each in [*(reason["text"] for reason in told["reasons"]), *told["what_would_change_it"]]:
        assert each in printed
        checks.said(each)
    if told["recommended"] is None:
        assert not any(map(checks.usable, METHODS))
        assert "recommended" not in printed
        problem = plan.problem()
        assert problem.fix == ("; ".join(told["what_would_change_it"]) or "use a smaller model")
        assert ("would fit" in problem.what) == any(each["fits"] for each in told["methods"])
    else:
        assert checks.usable(told["recommended"])
        assert printed.startswith(f"recommended: {told['recommended']} ")
    for cell, each in zip(cells(plan), told["methods"], strict=True):
        assert cell[:2] == [each["method"], "yes" if each["fits"] else "no"]
        assert each["fits"] == (each["safe_memory_bytes"] <= told["hardware"]["memory_bytes"])
        assert number(cell[3]) == pytest.approx(each["safe_memory_bytes"] / GIB, abs=0.06)
        assert number(cell[7]) == pytest.approx(each["hours"], rel=0.01)
    count = told["hardware"]["count"]
    assert (f"{count} x {told['hardware']['name']}," in heading(plan)[1]) == (count > 1)
