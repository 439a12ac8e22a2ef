"""Rules, options and corrections of the plan, without a model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import ROOT, chat_row
from tunesmith.cli.plan import Request, facts_of, read_asks, recipe_of
from tunesmith.engine.optim.adamw import AdamW
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import DataError, PlanError, RecipeError
from tunesmith.hardware.calibration import ROOFLINE, Correction, Entry, add_entries, bytes_beside, read_entries, time_correction
from tunesmith.hardware.catalogue import GIB, Device, find_device, read_gpus
from tunesmith.io.atomic import read_json, write_json
from tunesmith.models.architecture import Architecture
from tunesmith.models.catalogue import known_models
from tunesmith.models.families import read_architecture
from tunesmith.pipeline import settle_method
from tunesmith.planner.bytes.step import estimate, offloaded_bytes
from tunesmith.planner.chart import frontier
from tunesmith.planner.datafacts import assumed, read_facts
from tunesmith.planner.decide import CHOICES, Asks, smallest_cluster
from tunesmith.planner.options import OVERHEAD, Planner, corrected, roofline_step
from tunesmith.planner.plan import plan_for, with_settings
from tunesmith.planner.result import Plan
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.speed import EFFICIENCY, FLEX_SHARE, Times, micro_batch_work, times
from tunesmith.planner.text import WIDTH, bars, cells, confidence, heading, settings_line, verdict
from tunesmith.planner.tracing.building import make_optimizer
from tunesmith.recipe import Method, ResolvedRecipe, parse_recipe

GPUS = read_gpus()


def recipe(model: str = "Qwen/Qwen2-7B", *overrides: str) -> ResolvedRecipe:
    return parse_recipe(f"model: {model}\ndata: {{train: rows.jsonl}}\n", "test", Path("/nowhere"), overrides)


def planned(model: str, gpu: str, rows: int = 10_000, length: int = 2048, **asks: Any) -> Plan:
    return plan_for(recipe(model).recipe, assumed(rows, length), find_device(gpu, GPUS), GPUS, asks=Asks(**asks), entries=[])


def rules(plan: Plan) -> dict[str, str]:
    return {reason.rule: reason.text for reason in plan.reasons}


def test_qwen2_7b_on_24_gb_is_lora() -> None:
    plan = planned("Qwen/Qwen2-7B", "24GB")
    assert plan.recommended == "lora"
    assert {method: option.fits for method, option in plan.options.items()} == {"full": False, "lora": True, "qlora": True}
    assert plan.options["lora"].least_memory_bytes / GIB == pytest.approx(16.9, abs=0.5)
    assert plan.options["qlora"].least_memory_bytes / GIB == pytest.approx(8.1, abs=0.5)
    assert all(option.safe_memory_bytes <= plan.device.memory_bytes for option in plan.options.values() if option.fits)


def test_full_fits_one_large_gpu_with_small_states() -> None:
    option = planned("Qwen/Qwen2-7B", "48GB").options["full"]
    assert option.fits
    assert option.lever.optim == "adamw_8bit"
    whole = planned("Qwen/Qwen2-7B", "180GB").options["full"]
    assert whole.lever.optim == "adamw"


@pytest.mark.parametrize(
    ("gpu", "rows", "asks", "expected", "rule"),
    [
        ("24GB", 500, {}, "lora", "few-rows"),
        ("180GB", 200_000, {}, "full", "many-rows"),
        ("180GB", 1_000_000, {}, "full", "large-data"),
        ("180GB", 20_000, {}, "lora", "adapter-is-enough"),
        ("12GB", 10_000, {}, "qlora", "only-four-bit-is-left"),
        ("12GB", 10_000, {"latency_critical": True}, None, "latency-critical"),
        ("24GB", 10_000, {"budget": 0.5}, None, "budget"),
        ("24GB", 10_000, {"hours": 15.0}, "qlora", "deadline"),
    ],
)
def test_every_answer_names_its_rule(gpu: str, rows: int, asks: dict[str, Any], expected: str | None, rule: str) -> None:
    plan = planned("Qwen/Qwen2-7B", gpu, rows, **asks)
    assert plan.recommended == expected
    assert rule in rules(plan)
    if expected is None:
        assert plan.problem().code == "TS704"


def test_rule_of_thumb_is_shown_where_it_disagrees() -> None:
    """1.4 times the weights: QLoRA by the rule of thumb, but LoRA fits."""
    plan = planned("Qwen/Qwen2-7B", "20GB")
    assert plan.as_dict()["rule_of_thumb"] == "qlora"
    assert plan.recommended == "lora"
    assert "): qlora; by the computed bytes, which decide: lora, qlora" in rules(plan)["memory-multiples"]


def test_large_models_name_the_smallest_cluster() -> None:
    plan = planned("meta-llama/Llama-3.1-405B", "8xH100")
    assert plan.recommended is None
    assert "406 B" in rules(plan)["large-model"]
    cluster = plan.clusters["qlora"]
    assert (cluster.device, cluster.count) == ("H100", 8)
    assert cluster.peak_memory_bytes <= 80 * GIB
    option = plan.options["lora"]
    fewest = smallest_cluster(option, plan.architecture, list(GPUS.values()))
    assert fewest is not None
    assert fewest.count * find_device(fewest.device, GPUS).memory_bytes > 2 * plan.architecture.parameters


def test_nothing_fits_and_the_nearest_is_named() -> None:
    plan = planned("Qwen/Qwen2-7B", "6GB")
    problem = plan.problem()
    assert "qlora, needs" in problem.what
    assert "qlora fits on one RTX 3060" in problem.fix


def test_states_in_the_machines_memory_let_full_fit_a_smaller_card() -> None:
    """15.2 GB of weights, and 12 bytes per parameter elsewhere; it costs the time to move them."""
    size = find_device("24GB", GPUS)
    options = {}
    for offloading in ("false", "true"):
        made = recipe("Qwen/Qwen2-7B", f"train.optimizer_offloading={offloading}", "train.optimizer_in_backward=true").recipe
        fixed = {"train.optimizer_in_backward"}
        plan = plan_for(made, assumed(10_000, 2048), size, GPUS, methods=["full"], entries=[], fixed=fixed)
        options[offloading] = plan.options["full"]
        told = [reason.text for reason in plan.reasons if reason.rule == "optimizer-offloading"]
    assert not options["false"].fits
    assert options["true"].fits
    assert "optimizer" not in options["true"].memory.breakdown
    scenario = options["true"].scenario
    beside = replace(scenario, optimizer_offloading=False)
    architecture = plan.architecture
    assert (offloaded_bytes(architecture, scenario), offloaded_bytes(architecture, beside)) == (
        estimate(architecture, beside).breakdown["optimizer"],
        0,
    )
    gib = offloaded_bytes(architecture, scenario) / GIB
    assert told == [f"optimizer_offloading needs up to {gib:.1f} GiB of host memory"]
    ways = [roofline_step(architecture, each, size, 1, 2048) for each in (scenario, beside)]
    assert ways[0].computing > ways[1].computing


@pytest.mark.parametrize("offloading", [False, True])
def test_a_probe_keeps_states_where_the_training_does(offloading: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    scenario = Scenario("full", rows=1, length=8, labelled=4, optimizer_offloading=offloading)
    made = make_optimizer([parameter], scenario)
    assert isinstance(made, AdamW)
    assert made.home.store == (torch.device("cpu") if offloading else None)


def test_more_memory_never_makes_it_slower() -> None:
    times = [planned("Qwen/Qwen2-7B", "H100").options["lora"].hours]
    small = replace(find_device("H100", GPUS), memory_bytes=20 * GIB)
    plan = plan_for(recipe().recipe, assumed(10_000, 2048), small, GPUS, entries=[])
    assert plan.options["lora"].hours >= times[0]


def test_text_stays_within_80_columns() -> None:
    for model, gpu in itertools.product(("Qwen/Qwen2-7B", "meta-llama/Llama-3.1-405B"), ("24GB", "8xH100")):
        plan = planned(model, gpu)
        lines = [*heading(plan), *bars(plan), *verdict(plan), *confidence(plan)]
        lines += [settings_line(option) for option in plan.options.values()]
        assert [line for line in lines if len(line) > WIDTH] == []
        widths = [max(map(len, column)) for column in zip(*cells(plan), strict=True)]
        assert sum(widths) + 2 * len(widths) <= WIDTH


def test_json_has_the_stable_keys_and_the_chart_every_method() -> None:
    plan = planned("Qwen/Qwen2-7B", "24GB")
    value = json.loads(json.dumps(plan.as_dict()))
    keys = {"method", "fits", "peak_memory_bytes", "breakdown", "seconds_per_step", "hours", "cost", "settings"}
    assert all(keys <= method.keys() for method in value["methods"])
    assert value["recommended"] == "lora"
    assert all({"rule", "source", "text"} == reason.keys() for reason in value["reasons"])
    chart = frontier(plan)
    assert chart.startswith("<svg")
    for name in ("full", "LoRA", "QLoRA", "24 GB GPU"):
        assert name in chart


def test_resolved_recipe_is_what_was_planned() -> None:
    plan = planned("Qwen/Qwen2-7B", "24GB")
    option = plan.options["lora"]
    resolved = with_settings(recipe(), option)
    assert resolved.recipe.method == "lora"
    assert resolved.recipe.train.gradient_checkpointing == option.lever.gradient_checkpointing
    assert resolved.recipe.train.per_device_train_batch_size == option.settings.per_device_train_batch_size
    assert resolved.origins["train.per_device_train_batch_size"] == "plan"
    assert resolved.origins["train.weight_decay"] == "default"
    again = plan_for(resolved.recipe, plan.facts, plan.device, GPUS, methods=["lora"], free=False, entries=[])
    assert again.options["lora"].peak_memory_bytes == option.peak_memory_bytes
    assert again.options["lora"].seconds_per_step == option.seconds_per_step


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_attention_is_kept_where_it_fits_and_there_is_one_result_to_keep(attention: str) -> None:
    """Long rows on a small card: what to recompute is a trade-off between memory and time."""
    resolved = recipe("Qwen/Qwen2-7B", f"train.attn_implementation={attention}", "train.per_device_train_batch_size=1")
    plan = plan_for(resolved.recipe, assumed(10_000, 8192), find_device("24GB", GPUS), GPUS, methods=["qlora"], entries=[])
    lever = plan.options["qlora"].lever
    assert lever.gradient_checkpointing == ("keep_attention" if attention == "auto" else True)
    assert ("except attention" in settings_line(plan.options["qlora"])) == (attention == "auto")


def test_what_the_user_set_is_left_as_it_is() -> None:
    resolved = recipe("Qwen/Qwen2-7B", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4")
    fixed = {"train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.gradient_checkpointing"}
    plan = plan_for(resolved.recipe, assumed(10_000, 2048), find_device("48GB", GPUS), GPUS, entries=[], fixed=fixed)
    for option in plan.options.values():
        assert option.settings.per_device_train_batch_size == 2
        assert option.settings.gradient_accumulation_steps == 4
        assert not option.lever.gradient_checkpointing
        assert not option.lever.optimizer_in_backward


# --- data ---


def facts(tmp_path: Path, rows: list[Any], *overrides: str) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    resolved = parse_recipe(f"model: m\ndata: {{train: {path}, heldout: 0}}\n", "test", tmp_path, overrides)
    return read_facts(resolved.recipe.data, None)


def test_shared_prefixes_are_read_from_the_data(tmp_path: Path) -> None:
    system = "A system prompt that every row begins with. " * 20
    shared = facts(tmp_path, [chat_row(f"{i} times?", "yes", system) for i in range(100)])
    assert shared.rows == 100
    whole, padded = shared.batches(16, Limits(), packing=True)[0][0], shared.batches(16, Limits(), packing=False)[0][0]
    assert whole.row_tokens > 16 * 200
    assert whole.tokens < whole.row_tokens / 4
    assert padded.tokens >= padded.row_tokens - 16  # each row's last label only has to be told
    assert whole.labelled == padded.labelled
    # The last step has the longest rows, whose last labels are only targets.
    assert shared.batches(2, Limits(), packing=False)[-1][0].tokens == 2 * (shared.longest - 1)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_bound_is_of_the_longest_rows_however_few_they_are(tmp_path: Path, method: Method) -> None:
    """One row in 4,000 is long: a sample is unlikely to contain it, but a run will meet it."""
    short = [chat_row(f"{i}?", "yes") for i in range(3_999)]
    settings = ("train.per_device_train_batch_size=2", "train.packing=false")
    card = find_device("24GB", GPUS)
    bounds = []
    for rows in ([*short, chat_row("again? " * 900, "no")], short):
        made = facts(tmp_path, rows)
        asked = recipe("Qwen/Qwen2-7B", *settings).recipe
        option = plan_for(asked, made, card, GPUS, methods=[method], entries=[], free=False).options[method]
        assert option.scenario.tokens >= 2 * (made.longest - 1)
        bounds.append((option.peak_memory_bytes, option.safe_memory_bytes))
    assert bounds[0][0] > bounds[1][0]
    assert bounds[0][1] > bounds[1][1]


def test_rows_that_cannot_be_used_do_not_count(tmp_path: Path) -> None:
    rows: list[Any] = [chat_row("a?", "b") for _ in range(30)] + [{"nothing": 1}] * 10
    assert facts(tmp_path, rows).rows == 30
    assert facts(tmp_path, rows, "data.max_rows=7").rows == 7
    with pytest.raises(DataError, match="no row of the sample"):
        facts(tmp_path, [{"nothing": 1}])


def test_pairs_count_both_sides_and_share_their_prompts(tmp_path: Path) -> None:
    system = "A system prompt that every row begins with. " * 10
    rows = [{"prompt": f"{i} times? {'x' * i}", "chosen": f"yes {i} " * 9, "rejected": f"no {i} " * 20} for i in range(100)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = parse_recipe(
        f"model: m\ndata: {{train: {path}, heldout: 0}}\n", "test", tmp_path, [f"data.system={system}"]
    ).recipe.data
    pairs = read_facts(data, None, "dpo")
    assert (pairs.rows, pairs.as_dict()["sequences_per_row"]) == (100, 2)
    assert len(pairs.sequences) == 2 * len(pairs.sample)
    whole, padded = pairs.batches(8, Limits(), packing=True)[0][0], pairs.batches(8, Limits(), packing=False)[0][0]
    assert whole.row_tokens == pytest.approx(16 * pairs.mean_tokens, rel=0.2)
    assert whole.tokens < whole.row_tokens / 2
    assert padded.tokens >= padded.row_tokens - 16  # each row's last label only has to be told
    assert whole.labelled == padded.labelled
    several = pairs.batches(8, Limits(400), packing=True)[0]
    assert len(several) > 1
    assert sum(batch.row_tokens for batch in several) == whole.row_tokens
    with pytest.raises(DataError, match="no row of the sample"):
        read_facts(data, None)


def test_preference_takes_both_sides_and_a_forward_pass_before(tmp_path: Path) -> None:
    options = {}
    for objective in ("sft", "dpo"):
        made = recipe("Qwen/Qwen2-7B", f"objective={objective}", "train.effective_batch_size=8").recipe
        facts_of_it = assumed(1_000, 512, made.objective)
        options[objective] = plan_for(made, facts_of_it, find_device("80GB", GPUS), GPUS, entries=[], free=False).options[
            "lora"
        ]
    sft, dpo = options["sft"], options["dpo"]
    assert sft.seconds_before == 0
    assert 2.0 < dpo.seconds_per_step / sft.seconds_per_step < 2.3
    epoch = dpo.seconds_per_step * dpo.steps / dpo.settings.num_train_epochs
    assert 0.3 < dpo.seconds_before / epoch < 0.55  # a forward pass relative to forward and backward with frozen weights
    assert dpo.hours == pytest.approx((dpo.seconds_before + dpo.steps * dpo.seconds_per_step) / 3600)
    assert dpo.settings.learning_rate == 1e-5


# --- time ---


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return read_architecture(known_models()["Qwen/Qwen2-7B"])


def work(architecture: Architecture, **more: Any) -> Any:
    scenario = Scenario(**{"method": "lora", "rows": 1, "length": 2048, "labelled": 1024, **more})
    return micro_batch_work(architecture, scenario, estimate(architecture, scenario), 2048)


def test_flops_are_those_of_the_trace(architecture: Architecture) -> None:
    """The trace of this step counts 92.6 TFLOP with all 2,047 positions labelled, attention without its causal half."""
    made = work(architecture, labelled=2047, gradient_checkpointing=True)
    whole_attention = made.flops + made.attention_flops
    assert whole_attention / 1e12 == pytest.approx(92.6, rel=0.03)


def test_time_follows_what_is_computed(architecture: Architecture) -> None:
    full, lora, again = work(architecture, method="full"), work(architecture), work(architecture, gradient_checkpointing=True)
    assert full.product_flops > again.product_flops > lora.product_flops
    assert again.product_flops / lora.product_flops == pytest.approx(1.5, abs=0.05)
    assert again.attention_flops / lora.attention_flops == pytest.approx(4.5 / 3.5)
    kept = work(architecture, gradient_checkpointing="keep_attention")
    assert (kept.product_flops, kept.attention_flops) == (again.product_flops, lora.attention_flops)
    assert work(architecture, method="qlora").moved_bytes > lora.moved_bytes
    assert work(architecture, length=4096).attention_flops == 2 * lora.attention_flops


def test_a_gpu_waits_for_the_host_where_there_is_little_to_compute(architecture: Architecture) -> None:
    """The longer of both: launching operators takes the same for 256 tokens as for 2,048; for 8,192, computing dominates."""
    h100, each = find_device("H100", GPUS), EFFICIENCY["cuda"]
    few, some, many = (work(architecture, length=length, labelled=1024 * length // 2048) for length in (256, 2048, 8192))
    assert few.operators == some.operators == many.operators
    starting = some.operators * each.function_seconds
    assert times(few, h100).seconds == times(some, h100).seconds == starting
    computing = many.product_flops / (h100.flops["bfloat16"] * each.of_products(8192))
    assert times(many, h100).seconds > max(starting, computing)
    slow = find_device("RTX 3060", GPUS)
    assert times(some, slow).seconds > 2 * starting
    cpu = replace(slow, kind="cpu")
    assert times(some, cpu).computing > some.weight_bytes / (cpu.bandwidth * EFFICIENCY["cpu"].bandwidth)


def test_rates_fall_with_few_tokens_and_short_contexts(architecture: Architecture) -> None:
    """As measured on an H100: 2,048 tokens reach 93 % of what many do, a context of 1,600 half, flex attention half of that."""
    each, h100 = EFFICIENCY["cuda"], find_device("H100", GPUS)
    assert each.of_products(2048) / each.products == pytest.approx(0.93, abs=0.01)
    assert each.of_attention(1600) == each.attention / 2
    plain, flex = (work(architecture, length=8192, attention=kind) for kind in ("sdpa", "flex"))
    longer = plain.attention_flops / (h100.flops["bfloat16"] * each.of_attention(2048)) * (1 / FLEX_SHARE - 1)
    assert times(flex, h100).computing - times(plain, h100).computing == pytest.approx(longer)


def test_a_real_gpu_is_predicted() -> None:
    """Peak memory of the rows that an H100 has measured, as nvidia-smi saw it: within 5 %, never under."""
    measured = json.loads((ROOT / "benchmarks/results/gpu_h100.json").read_text(encoding="utf-8"))["rows"]
    planned_rows = [row for row in measured if 3 in row["tables"]]
    assert planned_rows
    for row in planned_rows:
        over = OVERHEAD["cuda"].typical(row["planned_allocated_bytes"], {}) / row["nvidia_smi_bytes"]
        assert 1 <= over <= 1.05, row["part"]
        assert row["planned_allocated_bytes"] <= row["allocated_bytes"] <= row["reserved_bytes"]


def entry(time: float, **more: Any) -> Entry:
    fields: dict[str, Any] = {"source": "run", "method": "lora", "dtype": "bfloat16", "hidden_size": 576}
    return Entry(device="cpu", torch="2", date="2026-01-01", time=time, **{"roofline": ROOFLINE, **fields, **more})


def test_corrections_come_from_like_measurements(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    assert read_entries(file) == []
    add_entries(file, [entry(7.0, roofline=ROOFLINE - 1)])
    assert time_correction(read_entries(file), "cpu", "lora", "bfloat16", 576).measurements == 0  # for a different prediction
    add_entries(
        file, [entry(1.5), entry(1.7), entry(1.6, bytes_beside=2**30), entry(9.0, method="full"), entry(4.0, hidden_size=4096)]
    )
    entries = read_entries(file)
    assert len(entries) == 6
    typical = time_correction(entries, "cpu", "lora", "bfloat16", 640)
    assert (typical.typical, typical.measurements) == (1.6, 3)
    assert typical.safe > 1.7
    assert time_correction(entries, "cpu", "lora", "bfloat16", 5120).typical == 4.0
    assert time_correction(entries, "other", "lora", "bfloat16", 576).measurements == 0
    assert bytes_beside(entries, "cpu", "lora") == 2**30
    assert bytes_beside(entries, "cpu", "full") is None
    older = [{**each, "memory": 1.2} for each in read_json(file)]
    write_json(file, older)
    assert read_entries(file) == entries
    file.write_text("{broken", encoding="utf-8")
    assert read_entries(file) == []


def test_each_side_of_a_step_is_corrected_by_its_own_measurements() -> None:
    """A host twice as fast shortens a step until the GPU takes longer; its ratio says nothing about the GPU's compute."""
    known = [entry(0.5, bound="starting"), entry(0.5, bound="starting"), entry(1.2)]
    starting, computing = (time_correction(known, "cpu", "lora", "bfloat16", 576, bound) for bound in ("starting", "computing"))
    assert (starting.typical, starting.measurements, computing.typical, computing.measurements) == (0.5, 2, 1.2, 1)
    step = Times(computing=3.0, starting=4.0)
    assert (step.seconds, step.bound) == (4.0, "starting")
    made = corrected(step, computing, starting)
    assert step.seconds * made.typical == pytest.approx(3.6)  # the GPU's 3 seconds, corrected
    assert made.measurements == 1
    assert step.seconds * corrected(step, Correction(0.1, 0.2, 1), starting).typical == pytest.approx(2.0)
    plain = time_correction([], "cpu", "lora", "bfloat16", 576)
    assert corrected(step, plain, plain) == plain


def test_a_measurement_moves_the_plan() -> None:
    device = find_device("24GB", GPUS)
    plain = plan_for(recipe().recipe, assumed(10_000, 2048), device, GPUS, entries=[]).options["lora"]
    known = [replace(entry(2.0, hidden_size=3584), device=device.name)]
    slow = plan_for(recipe().recipe, assumed(10_000, 2048), device, GPUS, entries=known).options["lora"]
    assert slow.seconds_per_step == pytest.approx(2 * plain.seconds_per_step)
    assert slow.time_measurements == 1
    assert slow.peak_memory_bytes == plain.peak_memory_bytes


def test_what_a_run_took_beside_its_tensors_is_added_and_not_multiplied() -> None:
    device = find_device("24GB", GPUS)
    known = [replace(entry(1.0), device=device.name, bytes_beside=2**30)]
    plain, found = (
        plan_for(recipe().recipe, assumed(10_000, 2048), device, GPUS, entries=entries, free=False).options["lora"]
        for entries in ([], known)
    )
    assert found.peak_memory_bytes - plain.peak_memory_bytes == 2**30 - OVERHEAD["cuda"].typical_bytes


def test_what_products_keep_is_added_in_bfloat16_until_runs_tell() -> None:
    cpu = Device("cpu", "a CPU", 1, 2**35, {"float32": 1e11, "bfloat16": 2e11}, 2e10, 0.0)
    with_amx = replace(cpu, product_bytes=2**27)
    known = [replace(entry(1.0), device=cpu.name, bytes_beside=2**30)]

    def peaks(resolved: ResolvedRecipe, entries: list[Entry]) -> list[int]:
        facts = assumed(100, 512)
        made = (plan_for(resolved.recipe, facts, device, GPUS, entries=entries, free=False) for device in (cpu, with_amx))
        return [plan.options["lora"].peak_memory_bytes for plan in made]

    without, more = peaks(recipe("SmolLM2-135M"), [])
    assert more - without == 2**27
    assert len({*peaks(recipe("SmolLM2-135M"), known)}) == 1
    assert len({*peaks(recipe("SmolLM2-135M", "train.compute_dtype=float32"), [])}) == 1


# --- typed input ---


def request(**more: Any) -> Request:
    methods: list[Method] = ["lora"]
    fields: dict[str, Any] = {
        "model": "Qwen/Qwen2-7B",
        "gpu": "24GB",
        "data": None,
        "rows": 100,
        "length": 64,
        "methods": methods,
        "budget": None,
        "deadline": None,
        "latency_critical": False,
        "gpus": None,
        "overrides": [],
    }
    return Request(**{**fields, **more})


@pytest.mark.parametrize(("text", "dollars"), [("20$", 20), ("$20", 20), ("20", 20), ("3.50 USD", 3.5)])
def test_budgets(text: str, dollars: float) -> None:
    assert read_asks(request(budget=text)).budget == dollars


@pytest.mark.parametrize(("text", "hours"), [("4h", 4), ("90m", 1.5), ("2d", 48), ("30 min", 0.5)])
def test_deadlines(text: str, hours: float) -> None:
    assert read_asks(request(deadline=text)).hours == hours


@pytest.mark.parametrize("more", [{"budget": "much"}, {"budget": "-3"}, {"deadline": "4"}, {"deadline": "soon"}])
def test_what_cannot_be_read_is_told(more: dict[str, str]) -> None:
    with pytest.raises(PlanError) as caught:
        read_asks(request(**more))
    assert caught.value.problems[0].code == "TS703"


@pytest.mark.parametrize("more", [{"rows": 0}, {"rows": -5}, {"length": 3}])
def test_sizes_that_cannot_be_are_told(more: dict[str, int]) -> None:
    asked = request(**more)
    with pytest.raises(PlanError, match="too small"):
        facts_of(asked, recipe_of(asked))


def test_overrides_reach_the_plan() -> None:
    asked = request(overrides=["lora.r=64"])
    resolved = recipe_of(asked)
    planner = Planner(
        read_architecture(known_models()["Qwen/Qwen2-7B"]), resolved.recipe, assumed(100, 64), find_device("24GB", GPUS), []
    )
    assert planner.best("lora").settings.r == 64
    with pytest.raises(RecipeError):
        recipe_of(request(overrides=["lora.rank=64"]))


@pytest.mark.parametrize(
    ("gpu", "rows", "method"), [("12GB", 2_000, "qlora"), ("24GB", 2_000, "lora"), ("B200", 200_000, "full")]
)
def test_auto_says_why_for_each_method(
    gpu: str, rows: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`method: auto` settles whatever is recommended, and prints the one rule that chose it."""
    line = json.dumps(chat_row("Which colour?", "red")) + "\n"
    (tmp_path / "train.jsonl").write_text(line * rows, encoding="utf-8")
    monkeypatch.setattr("tunesmith.hardware.catalogue.this_device", lambda gpus: find_device(gpu, gpus))
    text = "model: Qwen/Qwen2-7B\nmethod: auto\ndata: {train: train.jsonl}\n"
    settled = settle_method(parse_recipe(text, "recipe.yaml", tmp_path), Console(stderr=True, width=200))
    assert settled.recipe.method == method
    assert f"method {method}: " in capsys.readouterr().err
    plan = planned("Qwen/Qwen2-7B", gpu, rows)
    assert plan.recommended == method
    assert len([reason for reason in plan.reasons if reason.rule in CHOICES]) == 1
