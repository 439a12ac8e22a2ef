"""The plan's figures against values worked out by hand: bytes, seconds, steps, money, and the checks against the request.

Qwen2-7B's shape below is the published one. Cards are invented so that a single part accounts for all of a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.bench import Bench, byte_model, little_work, many_rows, stored
from tunesmith.hardware.calibration import ROOFLINE, Entry, read_entries
from tunesmith.hardware.catalogue import Device, read_gpus
from tunesmith.io.atomic import write_json
from tunesmith.models.architecture import Architecture
from tunesmith.models.catalogue import known_models
from tunesmith.models.families import read_architecture
from tunesmith.planner.bytes.step import estimate, sharded_bytes
from tunesmith.planner.datafacts import assumed
from tunesmith.planner.decide import Asks
from tunesmith.planner.options import Option
from tunesmith.planner.plan import plan_for
from tunesmith.planner.result import Plan
from tunesmith.planner.scenario import Scenario
from tunesmith.recipe import Method, parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.plan.stage import plan, score
from tunesmith.stages.train import train
from tunesmith.stages.train.metrics import StepMetrics
from tunesmith.stages.train.summary import figures_of

GIB = 2**30
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")

# Qwen2-7B: https://huggingface.co/Qwen/Qwen2-7B/blob/main/config.json
HIDDEN, LAYERS, WIDE, VOCABULARY, KEYS = 3584, 28, 18944, 152064, 4 * 128
SHAPES = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), *[(HIDDEN, WIDE)] * 2, (WIDE, HIDDEN)]
LINEAR = LAYERS * sum(inputs * outputs for inputs, outputs in SHAPES)
TABLE = VOCABULARY * HIDDEN  # the embedding; the head has the same size
BIASES_AND_NORMS = LAYERS * (HIDDEN + 2 * KEYS + 2 * HIDDEN) + HIDDEN
PARAMETERS = LINEAR + 2 * TABLE + BIASES_AND_NORMS
RANK = 16
ADAPTER = LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs in SHAPES)

#: Bytes of a weight in NF4: half a byte, one scale byte per 64 weights, four bytes per 256 scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


def card(**more: Any) -> Device:
    """A card on which only GEMMs and attention take time, at one TFLOP per second."""
    flops = {"bfloat16": 1e12, "float32": 1e11}
    given = {"kind": "cuda", "name": "made up", "count": 1, "memory_bytes": 1000 * GIB, "price": 1.25, "bandwidth": 1e30}
    return Device(**{**given, "flops": flops, **more})


def planned(
    *overrides: str,
    rows: int = 1_000,
    length: int = 513,
    device: Device | None = None,
    methods: Sequence[Method] = METHODS,
    entries: Sequence[Entry] = (),
    asks: Asks = Asks(),
) -> Plan:
    """The plan of exactly these settings: four rows per micro-batch, two micro-batches per step, padded."""
    base = (
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "train.packing=false",
        f"lora.r={RANK}",
    )
    text = "model: Qwen/Qwen2-7B\ndata: {train: rows.jsonl}\n"
    recipe = parse_recipe(text, "test", Path("/nowhere"), [*base, *overrides]).recipe
    facts = assumed(rows, length, recipe.objective)
    return plan_for(recipe, facts, device or card(), {}, methods=methods, entries=entries, free=False, asks=asks)


def option(method: Method, *overrides: str, **more: Any) -> Option:
    return planned(*overrides, methods=[method], **more).options[method]


@pytest.fixture(scope="module")
def qwen() -> Architecture:
    return read_architecture(known_models()["Qwen/Qwen2-7B"])


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with little_work():
        yield


# --- bytes ---


def test_the_shape_is_the_published_one(qwen: Architecture) -> None:
    assert PARAMETERS == 7_615_616_512
    assert (qwen.parameters, qwen.linear_weights, qwen.lora_parameters(RANK)) == (PARAMETERS, LINEAR, ADAPTER)


#: Bytes per parameter of AdamW's states and masters, by format.
STATES = {"adamw": 12, "adamw_kahan": 6, "adamw_8bit": 2 + 8 / 256}


@pytest.mark.parametrize("optim", STATES)
def test_full_fine_tuning_holds_weights_gradients_and_states(optim: str) -> None:
    made = option("full", f"train.optim={optim}")
    parts = made.memory.breakdown
    assert parts["weights"] == 2 * PARAMETERS
    assert parts["optimizer"] == round(STATES[optim] * PARAMETERS)
    assert made.memory.total_bytes == sum(parts.values()) >= (4 + STATES[optim]) * PARAMETERS
    in_float32 = option("full", f"train.optim={optim}", "train.compute_dtype=float32").memory.breakdown
    assert in_float32["weights"] == 4 * PARAMETERS
    assert in_float32["optimizer"] == round({"adamw": 8, "adamw_kahan": 4}.get(optim, STATES[optim]) * PARAMETERS)


@pytest.mark.parametrize(
    ("method", "base"), [("lora", 2 * PARAMETERS), ("qlora", round(NF4 * LINEAR) + 2 * (PARAMETERS - LINEAR))]
)
def test_an_adapter_is_held_in_float32_beside_its_base(method: Method, base: int) -> None:
    made = option(method)
    parts = made.memory.breakdown
    assert (parts["weights"], parts["adapter"], parts["optimizer"]) == (base, 4 * ADAPTER, 8 * ADAPTER)
    assert made.memory.resident_bytes == base + 4 * ADAPTER
    # Labels, and the least that a block keeps: its input and the inputs of its linear layers, in bfloat16.
    kept = 2 * 4 * 512 * LAYERS * (2 * HIDDEN + WIDE)
    assert made.memory.total_bytes == sum(parts.values()) > base + 16 * ADAPTER + kept


@pytest.mark.parametrize(("devices", "stage"), [(2, 1), (8, 1), (8, 2), (64, 3)])
def test_shared_states_are_divided(qwen: Architecture, devices: int, stage: int) -> None:
    """ZeRO (arXiv 1910.02054, figure 1): stage 1 divides 12 of the 16 bytes, 2 also the gradients', 3 all of them."""
    scenario = Scenario("full", rows=1, length=512, labelled=511)
    shared, alone = sharded_bytes(qwen, scenario, devices, stage), estimate(qwen, scenario).total_bytes
    whole = {1: 4, 2: 2, 3: 0}[stage]
    assert shared >= PARAMETERS * (whole + (16 - whole) / devices)
    if stage == 1:
        assert alone - shared == 12 * PARAMETERS - math.ceil(12 * PARAMETERS / devices)
    assert shared < alone


BOUNDS = {"cuda": (1.04, 1.15), "cpu": (1.25, 0.6)}  # factor of allocated bytes, and additional GiB


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_bound_is_built_from_what_is_allocated(method: Method, kind: str) -> None:
    share, beside = BOUNDS[kind]
    made = option(method, device=card(kind=kind))
    allocated = made.memory.total_bytes
    assert made.safe_memory_bytes == pytest.approx(allocated * share + beside * GIB, abs=2)
    assert made.safe_memory_bytes >= 1.02 * made.peak_memory_bytes > 1.02 * allocated
    if kind == "cuda":
        assert made.peak_memory_bytes == pytest.approx(allocated * 1.01 + 0.97 * GIB, abs=2)
    told = made.as_dict()
    names = ("peak_memory_bytes", "safe_memory_bytes", "allocated_bytes")
    assert [told[name] for name in names] == [made.peak_memory_bytes, made.safe_memory_bytes, allocated]


@pytest.mark.parametrize("method", METHODS)
def test_a_card_fits_from_the_bound_on(method: Method) -> None:
    needed = option(method).safe_memory_bytes
    for memory, fits in ((needed, True), (needed - 1, False)):
        made = planned(methods=[method], device=card(memory_bytes=memory))
        assert made.options[method].fits == fits
        assert made.recommended == (method if fits else None)


def entry(time: float = 1.0, beside: float | None = None, method: str = "lora", **more: Any) -> Entry:
    given = {
        "device": "made up",
        "torch": "2",
        "date": "2026-01-01",
        "source": "run",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
    }
    bytes_beside = None if beside is None else round(beside * GIB)
    return Entry(**{**given, "method": method, "time": time, "bytes_beside": bytes_beside, "roofline": ROOFLINE, **more})


def test_the_bound_is_never_below_what_runs_have_shown() -> None:
    """The runs' memory outside tensors moves the typical peak; the bound stays two percent above it."""
    plain = option("lora")
    allocated = plain.memory.total_bytes
    little, much = (option("lora", entries=[entry(beside=beside)]) for beside in (0.5, 40.0))
    assert little.peak_memory_bytes == pytest.approx(allocated * 1.01 + 0.5 * GIB, abs=2)
    assert little.safe_memory_bytes == plain.safe_memory_bytes
    assert much.peak_memory_bytes == pytest.approx(allocated * 1.01 + 40 * GIB, abs=2)
    assert much.safe_memory_bytes == pytest.approx(1.02 * (allocated * 1.01 + 40 * GIB), abs=2)
    several = option("lora", entries=[entry(beside=beside) for beside in (1.0, 9.0, 2.0)])
    assert several.peak_memory_bytes == pytest.approx(allocated * 1.01 + 9 * GIB, abs=2)  # the most of them


@pytest.mark.parametrize("name", ["T4", "RTX 4090", "H100", "B200"])
def test_on_every_card_the_bound_is_above_the_peak_and_the_peak_above_the_least(name: str) -> None:
    gpus = read_gpus()
    recipe = parse_recipe("model: Qwen/Qwen2-7B\ndata: {train: rows.jsonl}\n", "test", Path("/nowhere")).recipe
    for made in plan_for(recipe, assumed(10_000, 1024), gpus[name], {}, entries=[]).options.values():
        assert made.safe_memory_bytes > made.peak_memory_bytes >= made.least_memory_bytes > made.memory.resident_bytes
        assert made.fits == (made.safe_memory_bytes <= gpus[name].memory_bytes)


# --- seconds ---

TOKENS = 4 * 512  # per micro-batch: the last of a row's 513 tokens is only a target


def seconds(products: float, attention: float, tokens: int = TOKENS) -> float:
    """On the invented card: GEMMs and attention to 513 tokens at their shares of its peak."""
    return products / (1e12 * 0.80 * tokens / (tokens + 150)) + attention / (1e12 * 0.65 * 513 / (513 + 1600))


#: FLOPs per token: per weight, per adapter weight, per head weight, and attention's passes over half the context.
FLOPS: dict[tuple[Method, str], tuple[int, int, int, float]] = {
    ("full", "false"): (6, 0, 6, 3.5),
    ("full", "true"): (8, 0, 6, 4.5),
    ("lora", "false"): (4, 6, 4, 3.5),
    ("lora", "true"): (6, 8, 4, 4.5),
    ("lora", "keep_attention"): (6, 8, 4, 3.5),
    ("qlora", "false"): (4, 6, 4, 3.5),
}


@pytest.mark.parametrize(("method", "again"), FLOPS)
def test_a_steps_seconds_are_its_flops_over_the_cards(method: Method, again: str) -> None:
    weight, adapter, head, passes = FLOPS[method, again]
    made = option(method, f"train.gradient_checkpointing={again}")
    products = TOKENS * (weight * LINEAR + adapter * ADAPTER + head * TABLE)
    attention = passes * 2 * 513 * HIDDEN * LAYERS * TOKENS
    expected = 2 * seconds(products, attention)
    assert made.seconds_per_step == made.roofline_seconds == pytest.approx(expected, rel=1e-6)
    assert made.bound == "computing"
    assert made.tokens_per_second == pytest.approx(8 * 513 / expected, rel=1e-6)
    assert made.seconds_before == 0
    assert made.steps == 3 * 125  # epochs of a thousand rows in batches of eight
    assert made.hours == pytest.approx(375 * expected / 3600)
    assert made.cost == pytest.approx(1.25 * made.hours)


def test_a_cpu_computes_and_starts_one_after_the_other() -> None:
    """Shares of a CPU's peak: 80 % for GEMMs, half for attention; launching an operator takes 15 microseconds."""
    made = option("full", device=card(kind="cpu"))
    products = TOKENS * (6 * LINEAR + 6 * TABLE)
    attention = 3.5 * 2 * 513 * HIDDEN * LAYERS * TOKENS
    computing = 2 * (products / 0.8e12 + attention / 0.5e12)
    assert made.seconds_per_step == pytest.approx(computing + 2 * 1.5e-5 * made.memory.operators, rel=1e-6)


def test_states_elsewhere_travel_there_and_back() -> None:
    """12 bytes per parameter over PCIe at 22 GB/s, once per step and not per micro-batch; the card holds none of them."""
    beside, elsewhere = (option("full", f"train.optimizer_offloading={moved}") for moved in ("false", "true"))
    travel = elsewhere.seconds_per_step - beside.seconds_per_step
    assert travel == pytest.approx(2 * 12 * PARAMETERS / 2.2e10, rel=1e-6)
    assert "optimizer" not in elsewhere.memory.breakdown
    assert beside.memory.total_bytes - elsewhere.memory.total_bytes > 11 * PARAMETERS


@pytest.mark.parametrize("rows", [1_000, 4_000])
def test_a_reference_takes_a_forward_pass_over_both_sides_of_all_pairs(rows: int) -> None:
    made = option("lora", "objective=dpo", "train.max_steps=10", rows=rows)
    tokens = 4 * 2 * 512
    forward = tokens * 2 * (LINEAR + ADAPTER + TABLE)
    scores = 2 * 513 * HIDDEN * LAYERS * tokens
    assert made.seconds_before == pytest.approx(rows / 4 * seconds(forward, scores, tokens), rel=1e-6)
    step = 2 * seconds(tokens * (4 * LINEAR + 6 * ADAPTER + 6 * TABLE), 3.5 * scores, tokens)  # logits are computed twice
    assert made.seconds_per_step == pytest.approx(step, rel=1e-6)
    assert made.hours == pytest.approx((made.seconds_before + 10 * step) / 3600, rel=1e-6)
    assert made.cost == pytest.approx(1.25 * made.hours)
    assert made.as_dict()["seconds_before_first_step"] == made.seconds_before


@pytest.mark.parametrize(
    ("times", "typical", "safe"), [((), 1.0, 1.5), ((1.0,), 1.0, 1.1), ((0.8, 2.0, 1.2), 1.2, 2.04), ((3.0, 3.1), 3.05, 3.355)]
)
def test_measurements_correct_every_time(times: tuple[float, ...], typical: float, safe: float) -> None:
    """Their median; the bound is the largest plus two percent, but at least a tenth above the median."""
    known = [entry(time) for time in times] + [entry(9.0, method="full"), entry(9.0, device="another")]
    plain, made = (option("lora", "objective=dpo", entries=entries) for entries in ((), known))
    assert made.roofline_seconds == plain.seconds_per_step
    assert made.seconds_per_step == pytest.approx(typical * plain.seconds_per_step)
    assert made.safe_seconds_per_step == pytest.approx(safe * plain.seconds_per_step)
    assert made.seconds_before == pytest.approx(typical * plain.seconds_before)
    assert made.tokens_per_second == pytest.approx(plain.tokens_per_second / typical)
    assert made.hours == pytest.approx(typical * plain.hours)
    assert made.time_measurements == len(times)


# --- steps ---


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(10_000, 32, 3, 939), (1_000, 8, 3, 375), (1_001, 8, 3, 378), (7, 3, 2.5, 8), (100, 7, 0.5, 8), (5, 5, 1, 1)],
)
def test_steps_are_whole_batches_of_each_epoch(rows: int, batch: int, epochs: float, steps: int) -> None:
    """An epoch ends with the remaining rows, so three epochs of 313 steps are 939 and not 938."""
    asked = ["train.gradient_accumulation_steps=auto", "train.per_device_train_batch_size=auto"]
    asked += [f"train.effective_batch_size={batch}", f"train.num_train_epochs={epochs}"]
    made = option("lora", *asked, rows=rows)
    assert made.steps == made.settings.max_steps == steps
    assert made.settings.warmup_steps == math.ceil(steps / 20)
    assert made.hours == pytest.approx(steps * made.seconds_per_step / 3600)
    assert option("lora", *asked, "train.max_steps=17", rows=rows).steps == 17


# --- the request ---


@pytest.mark.parametrize("name", ["budget", "hours"])
def test_what_was_asked_is_kept_to_the_cent_and_the_second(name: str) -> None:
    """An exact match is within the limit."""
    made = option("lora")
    most = {"budget": made.cost, "hours": made.hours}[name]
    for limit, within in ((most, True), (math.nextafter(most, 0), False), (most * 0.999, False), (most * 1.001, True)):
        answer = planned(methods=["lora"], asks=Asks(budget=limit) if name == "budget" else Asks(hours=limit))
        assert answer.recommended == ("lora" if within else None)
        refusals = [reason.rule for reason in answer.reasons if reason.source == "asked"]
        assert refusals == ([] if within else [{"budget": "budget", "hours": "deadline"}[name]])


def test_a_method_that_is_too_slow_leaves_the_others() -> None:
    all_of_them = planned().options
    hours = {method: each.hours for method, each in all_of_them.items()}
    assert hours["full"] > hours["lora"] == hours["qlora"]
    between = (hours["full"] + hours["lora"]) / 2
    assert planned(rows=100_000).recommended == "full"
    assert planned(rows=100_000, asks=Asks(hours=100 * between)).recommended == "lora"
    assert planned(asks=Asks(hours=between, latency_critical=True)).recommended == "lora"
    assert planned(methods=["qlora"], asks=Asks(latency_critical=True)).recommended is None


@pytest.mark.parametrize(
    ("rows", "rule", "applies"),
    [
        (999, "few-rows", True),
        (1_000, "few-rows", False),
        (99_999, "many-rows", False),
        (100_000, "many-rows", True),
        (999_999, "large-data", False),
        (1_000_000, "large-data", True),
    ],
)
def test_rules_by_rows_begin_where_the_table_says(rows: int, rule: str, applies: bool) -> None:
    assert (rule in [reason.rule for reason in planned(rows=rows).reasons]) == applies


@pytest.mark.parametrize(("multiple", "method"), [(4.0, "full"), (1.5, "lora"), (0.5, "qlora")])
def test_the_rule_of_thumb_is_in_multiples_of_the_fp16_weights(multiple: float, method: str) -> None:
    at = round(2 * PARAMETERS * multiple)
    less = {"full": "lora", "lora": "qlora", "qlora": None}[method]
    for memory, wanted in ((at, method), (at - 1, less)):
        assert planned(device=card(memory_bytes=memory)).as_dict()["rule_of_thumb"] == wanted


# --- measurements of a run ---


def step(number: int, seconds: float, tokens: int = 100, computed: int = 80, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(number, loss, 1.0, 1e-4, tokens, computed, 30, seconds)


def test_a_summarys_figures_are_those_of_its_steps() -> None:
    """The median excludes the first step; the time before it counts towards the total but not towards speed."""
    steps = [step(1, 9.0, loss=4.0), step(2, 1.0), step(3, 4.0, tokens=300, computed=200), step(4, 2.0, loss=0.5)]
    assert figures_of(steps, 5.0) == {
        "steps": 4,
        "seconds_per_step": 2.0,
        "tokens_per_second": 600 / 16,
        "computed_tokens_per_second": 440 / 16,
        "seconds_before_first_step": 5.0,
        "seconds": 21.0,
        "first_loss": 4.0,
        "last_loss": 0.5,
    }
    assert figures_of(steps[:1], 0.0)["seconds_per_step"] == 9.0


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run with the plan and training figures that a test needs."""
    monkeypatch.setenv("TUNESMITH_CALIBRATION", str(tmp_path / "calibration.json"))
    text = "model: m\nmethod: lora\ndata: {train: rows.jsonl}\n"
    run = create_run(parse_recipe(text, "test", tmp_path), tmp_path / "run")

    def make(promise: dict[str, Any], summary: dict[str, Any], kind: str = "cuda") -> Run:
        hardware, model = {"kind": kind, "name": "made up"}, {"hidden_size": 64}
        contents = {"plan": {"hardware": hardware, "model": model, "methods": [promise]}, "train": summary}
        for stage, file in (("plan", "plan.json"), ("train", "summary.json")):
            with run.perform(stage, stage, {"is": json.dumps(contents[stage])}) as folder:
                write_json(folder / file, contents[stage])
        return run

    return make


PROMISE = {
    "method": "lora",
    "hours": 2.0,
    "peak_memory_bytes": 12 * GIB,
    "safe_memory_bytes": 13 * GIB,
    "allocated_bytes": 10 * GIB,
    "breakdown": {"weights": 10 * GIB},
    "seconds_per_step": 3.0,
    "safe_seconds_per_step": 4.5,
    "roofline_seconds_per_step": 2.0,
    "time_measurements": 3,
    "bound": "computing",
    "settings": {"compute_dtype": "bfloat16"},
}
SUMMARY = {"peak_memory_bytes": 10 * GIB, "seconds_per_step": 4.0, "seconds": 9000.0}


def test_a_promise_is_scored_in_percent_of_what_was_measured(finished: Any) -> None:
    scored = score(finished(PROMISE, SUMMARY))
    assert scored is not None
    errors = {name: scored[name]["error_percent"] for name in ("peak_memory_bytes", "seconds_per_step", "hours")}
    assert errors == pytest.approx({"peak_memory_bytes": 20.0, "seconds_per_step": -25.0, "hours": -20.0})
    assert scored["hours"] == {"promised": 2.0, "measured": 2.5, "error_percent": pytest.approx(-20.0)}


@pytest.mark.parametrize(("more", "within"), [(0, True), (1, False)])
def test_a_bound_holds_up_to_itself(finished: Any, more: int, within: bool) -> None:
    shown = {"peak_memory_bytes": 13 * GIB + more, "seconds_per_step": 4.5 + more / 1000}
    scored = score(finished(PROMISE, SUMMARY | shown))
    assert scored is not None
    assert (scored["within_safe_memory"], scored["within_safe_time"]) == (within, within)


def test_a_run_is_kept_as_a_measurement_once(finished: Any, tmp_path: Path) -> None:
    """Time divided by the uncorrected prediction; bytes beyond the allocated ones, with the context that the meter misses."""
    run = finished(PROMISE, SUMMARY)
    score(run)
    score(run)
    (kept,) = read_entries(tmp_path / "calibration.json")
    assert (kept.device, kept.method, kept.dtype, kept.hidden_size, kept.source) == ("made up", "lora", "bfloat16", 64, "run")
    assert kept.time == 4.0 / 2.0
    assert kept.bytes_beside == pytest.approx(10 * GIB - 1.01 * 10 * GIB + 0.76 * GIB, abs=2)
    assert (kept.bound, kept.roofline) == ("computing", ROOFLINE)


@pytest.mark.parametrize(("kind", "context"), [("cpu", 0.0), ("cuda", 0.76)])
def test_the_next_plan_promises_what_a_run_has_shown(finished: Any, tmp_path: Path, kind: str, context: float) -> None:
    device = card(kind=kind)
    first = option("lora", device=device)
    shown = {"peak_memory_bytes": first.memory.total_bytes + 7 * GIB, "seconds_per_step": 1.7 * first.seconds_per_step}
    score(finished(first.as_dict(), SUMMARY | shown, kind))
    after = option("lora", device=device, entries=read_entries(tmp_path / "calibration.json"))
    assert after.peak_memory_bytes == pytest.approx(shown["peak_memory_bytes"] + context * GIB, abs=4)
    assert after.safe_memory_bytes >= 1.02 * after.peak_memory_bytes - 2
    assert after.seconds_per_step == pytest.approx(shown["seconds_per_step"])
    assert after.safe_seconds_per_step == pytest.approx(1.1 * shown["seconds_per_step"])


def test_a_runs_plan_counts_its_own_rows_and_its_trainings_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, tokens and labels match train.arrow, and steps match the training that follows."""
    monkeypatch.setenv("TUNESMITH_CALIBRATION", str(tmp_path / "calibration.json"))
    bench = Bench(tmp_path, byte_model(tmp_path / "bytes"))
    run = bench.run(many_rows()[:30], heldout=0.2, num_train_epochs=1.5, effective_batch_size=7)
    told = plan(run, card(kind="cpu"), {})
    rows = stored(run)
    labels = [sum(row["loss_mask"][1:]) for row in rows]
    assert len(rows) == 24
    facts = told["data"]
    assert (facts["rows"], facts["sampled_rows"], facts["counted"]) == (24, 24, "prepared rows")
    assert facts["mean_tokens"] == pytest.approx(sum(len(row["input_ids"]) for row in rows) / 24, abs=0.05)
    assert facts["mean_labelled_tokens"] == pytest.approx(sum(labels) / 24, abs=0.05)
    assert facts["longest_tokens"] == max(len(row["input_ids"]) for row in rows)
    (promise,) = told["methods"]
    summary = train(run, Console(quiet=True))
    assert promise["steps"] == summary["steps"] == 6  # four steps per epoch, 1.5 epochs
    lines = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert summary["tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines)
    )
