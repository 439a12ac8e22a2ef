"""One case of benchmarks/gpu in its own process: builds the model, trains a few steps, prints one line of JSON.

    python cell.py CASE                  # of cases.py; --dry-run for a tiny model
    python cell.py CASE --calibrate      # seconds of its step for later plans, as in `plan --calibrate`
    python cell.py CASE --trace H100     # the plan and the trace for a GPU model; needs no GPU

Weights are random. Peak memory is the maximum that torch's allocator reserved plus what else the process has on the device
(context, libraries), as nvidia-smi counts it; on a CPU it is that of the process. run.py enables expandable segments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cases import CASES, TINY, Case
from rich.console import Console

from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.packing.batch import StepCollator, collate_tree
from tunesmith.engine.packing.tree import Limits
from tunesmith.hardware.calibration import read_entries, time_correction
from tunesmith.hardware.catalogue import Device, find_device, read_gpus, this_device
from tunesmith.hardware.memory import PeakMemory
from tunesmith.kernels import triton
from tunesmith.models import catalogue
from tunesmith.models.head import causal_of
from tunesmith.models.load import make_config, quiet
from tunesmith.planner.bytes.step import estimate
from tunesmith.planner.calibrate import calibrate
from tunesmith.planner.datafacts import DataFacts, Row
from tunesmith.planner.options import OVERHEAD, corrected, roofline_step
from tunesmith.planner.plan import calibration_file, plan_for
from tunesmith.planner.result import Plan
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.building import build_model, make_optimizer
from tunesmith.planner.tracing.trace import trace
from tunesmith.planner.tracing.traced import trace_peak
from tunesmith.recipe import Recipe
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.kernels import fuse_asked
from tunesmith.stages.train.losses import TokenLoss
from tunesmith.stages.train.recorder import Recorder

UNKNOWN, END = "<unknown>", "<end>"  # for a tokenizer that TRL requires and never uses
TIMED_AFTER = 1  # steps that only allocate and compile
GPUS = read_gpus()

Rows = list[dict[str, Any]]


def recipe_of(case: Case, model: str, kind: str) -> Recipe:
    """The case as a recipe for a kind of device: its rows form one micro-batch and one step."""
    own = {"per_device_train_batch_size": case.rows, "learning_rate": 1e-5, "warmup_ratio": 0.0, **case.train}
    if not own.get("optimizer_in_backward"):
        own["effective_batch_size"] = case.rows
    if kind == "cpu":
        for name in ("optimizer_offloading", "use_liger_kernel"):
            own.pop(name, None)  # for a dry run: refused without a GPU
    train = {**own, "max_steps": case.steps + TIMED_AFTER}
    values = {"model": model, "method": case.method, "data": {"train": "rows.jsonl"}, "lora": {"r": 16}, "train": train}
    return Recipe.model_validate(values)


def rows_of(case: Case, vocabulary: int) -> Rows:
    """Rows of random tokens that share their first ones; loss on the others, but not on the first token of a row."""
    drawn = random.Random(0)
    shared = [drawn.randrange(3, vocabulary) for _ in range(case.shared)]
    before = max(1, case.shared)
    made = []
    for _ in range(2 * case.rows):
        ids = shared + [drawn.randrange(3, vocabulary) for _ in range(case.own)]
        made.append({"input_ids": ids, "loss_mask": [place >= before for place in range(len(ids))], "length": len(ids)})
    return made


def planned(case: Case, recipe: Recipe, rows: Rows, device: Device) -> Plan:
    """The output of `tunesmith plan` for the case on the device."""
    sample = tuple(Row(row["input_ids"], sum(row["loss_mask"])) for row in rows)
    facts = DataFacts(len(rows), sample, "counted", shares=case.shared > 0)
    return plan_for(recipe, facts, device, GPUS, methods=[case.method], free=False)


def on_device() -> str:
    """The device type for tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Meter:
    """Seconds of steps and peak memory of a training that calls `step` after each step.

    With `profile` the last step is not timed; the times of its operators are written to that file.
    """

    def __init__(self, case: Case, profile: Path | None) -> None:
        self.peak = PeakMemory()
        self.seconds: list[float] = []
        self._begun = 0.0
        self._case, self._file = case, profile
        self._profile = torch.profiler.profile() if profile else None

    def start(self) -> None:
        """The model is built: reset the peak and the clock."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.peak.reset()
        self._begun = time.perf_counter()

    def step(self) -> None:
        """A step is over."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)
        if self._profile is not None and len(self.seconds) == self._case.steps:
            self._profile.start()
        elif self._profile is not None and self._file is not None and len(self.seconds) > self._case.steps:
            self._profile.stop()
            self._file.write_text(operators(self._profile), encoding="utf-8")
            self.seconds.pop()
        self._begun = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Medians and peaks, with the keys of a row."""
        case, timed = self._case, self.seconds[TIMED_AFTER:]
        reserved = self.peak.peak_bytes()
        beside = beside_allocator()
        seconds = statistics.median(timed)
        return {
            "seconds_per_step": seconds,
            "all_seconds": timed,
            "tokens_per_second": case.rows * case.length / seconds,
            "rows_per_second": case.rows / seconds,
            "reserved_bytes": reserved,
            "allocated_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "beside_bytes": beside,
            "peak_memory_bytes": reserved + beside,
            "nvidia_smi_bytes": seen_by_nvidia_smi(),
        }


def operators(profile: torch.profiler.profile) -> str:
    """A table of the slowest operators: on the device if there is one, and on the CPU that launches them."""
    averages, orders = profile.key_averages(), ["self_cpu_time_total"]
    if torch.cuda.is_available():
        orders.insert(0, "self_cuda_time_total")
    return "\n".join(averages.table(sort_by=order, row_limit=45, max_name_column_width=90) for order in orders)


def beside_allocator() -> int:
    """Device bytes in use outside torch's allocator: the context and libraries, if no other process uses the device."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def seen_by_nvidia_smi() -> int | None:
    """Bytes in use on the device now, according to nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def train_ours(case: Case, scenario: Scenario, values: dict[str, Any], rows: Rows, plan: Plan, meter: Meter) -> dict[str, Any]:
    """The engine as the train stage runs it, on a model built from its config."""
    model = build_model(make_config(values), scenario, on_device())
    use_tree_attention(model, on=True)
    settings = plan.options[case.method].settings
    fuse_asked(settings, causal_of(model))
    from datasets import Dataset

    scratch = Path(tempfile.mkdtemp())
    recorder = Recorder(scratch / "metrics.jsonl", settings.max_steps)
    engine = Engine(
        TokenLoss(),
        model,
        Dataset.from_list(rows),
        StepCollator(collate_tree, Limits(settings.per_device_max_tokens, settings.per_device_train_batch_size)),
        settings,
        recorder,
        scratch=scratch,
        tell=lambda code, text: print(code, text, file=sys.stderr),
    )
    recorder.on_step.append(lambda _, __: meter.step())
    meter.start()
    engine.train()
    return {**meter.result(), "losses": [step.loss for step in recorder.history]}


def train_stock(case: Case, scenario: Scenario, values: dict[str, Any], rows: Rows, meter: Meter) -> dict[str, Any]:
    """Transformers' model and loss, PEFT's preparation and adapters, torch's fused AdamW: the plan's `stock` configuration."""
    model = build_model(make_config(values), scenario, on_device())
    causal_of(model).set_attn_implementation("sdpa")
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], scenario)
    ids = torch.tensor([row["input_ids"] for row in rows[: case.rows]], device=on_device())
    losses = []
    meter.start()
    for _ in range(case.steps + TIMED_AFTER):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        meter.step()
    return {**meter.result(), "losses": losses}


def train_trl(case: Case, scenario: Scenario, values: dict[str, Any], rows: Rows, meter: Meter) -> dict[str, Any]:
    """TRL's SFTTrainer on the same rows and labels, in bf16: four rows per micro-batch, padded or packed (best fit)."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = build_model(make_config(values), scenario, on_device())
    causal_of(model).set_attn_implementation("sdpa")

    class Watch(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

    labelled = [
        {"input_ids": ids, "labels": [token if trained else -100 for token, trained in zip(ids, row["loss_mask"], strict=True)]}
        for row in rows
        for ids in [row["input_ids"]]
    ]
    words = Tokenizer(WordLevel({UNKNOWN: 0, END: 1}, unk_token=UNKNOWN))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    micro = min(4, case.rows)
    packed = case.side == "trl_packed"
    in_a_pack = 4  # rows
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro // in_a_pack if packed else micro,
        gradient_accumulation_steps=case.rows // micro,
        max_steps=case.steps + TIMED_AFTER,
        learning_rate=1e-5,
        max_length=in_a_pack * case.length if packed else None,
        packing=packed,
        bf16=on_device() == "cuda",
        gradient_checkpointing=bool(case.train.get("gradient_checkpointing")),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=on_device() == "cpu",
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(labelled), processing_class=tokenizer)
    trainer.add_callback(Watch())
    meter.start()
    trainer.train()
    return {**meter.result(), "micro_batch": micro}


def stock_scenario(case: Case, dtype: Any) -> Scenario:
    """The case as transformers and PEFT run it by default."""
    return Scenario(
        case.method,
        rows=case.rows,
        length=case.length,
        labelled=case.rows * (case.length - 1),
        dtype=dtype,
        gradient_checkpointing=bool(case.train.get("gradient_checkpointing")),
        optim="adamw_torch_fused",
        stock=True,
    )


def promised(case: Case, plan: Plan) -> tuple[Scenario, dict[str, Any]]:
    """The step that is trained, and its planned bytes and seconds."""
    option = plan.options[case.method]
    if case.side == "tunesmith":
        # On a GPU, flex attention keeps what SDPA keeps; the memory model only needs to know that batches are trees.
        return replace(option.scenario, attention="tree"), {
            "planned_bytes": option.peak_memory_bytes,
            "planned_safe_bytes": option.safe_memory_bytes,
            "planned_allocated_bytes": option.memory.total_bytes,
            "planned_seconds": option.seconds_per_step,
            "roofline_seconds": option.roofline_seconds,
            "bound": option.bound,
            "calibrations": option.time_measurements,
        }
    scenario, device, architecture = stock_scenario(case, option.scenario.dtype), plan.device, plan.architecture
    made, over = estimate(architecture, scenario), OVERHEAD[device.kind]
    roofline = roofline_step(architecture, scenario, device, 1, case.length)
    entries = read_entries(calibration_file())
    computing = time_correction(entries, device.name, case.method, scenario.dtype, architecture.hidden_size)
    found = corrected(roofline, computing, time_correction([], device.name, case.method, scenario.dtype, 1))
    return scenario, {
        "planned_bytes": over.typical(made.total_bytes, made.breakdown),
        "planned_safe_bytes": over.safe(made.total_bytes),
        "planned_allocated_bytes": made.total_bytes,
        "planned_seconds": roofline.seconds * found.typical,
        "roofline_seconds": roofline.seconds,
        "bound": roofline.bound,
        "calibrations": found.measurements,
    }


def traced(case: Case, plan: Plan, scenario: Scenario, values: dict[str, Any]) -> int:
    """Bytes that the real modules request on FakeTensors; of many blocks, a few are traced and scaled up."""
    option = plan.options[case.method]
    if case.side == "tunesmith":
        return trace_peak(plan, option).total_bytes
    return trace(make_config(values), scenario).total_bytes


def model_of(case: Case, *, dry: bool) -> str:
    """The model's name, or with `dry` a folder with the config of a tiny model of the same architecture."""
    if not dry:
        return case.model
    folder = Path(tempfile.mkdtemp())
    values = {**catalogue.known_models()[case.model], **TINY}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def main() -> None:
    """Measure, calibrate or trace a case, and print the line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("case", choices=[case.name for case in CASES])
    options.add_argument("--calibrate", action="store_true", help="measure its step for the plan, as `plan --calibrate` does")
    options.add_argument("--trace", metavar="GPU", help="plan it for a card of the catalogue and trace it; no GPU is needed")
    options.add_argument("--profile", type=Path, metavar="FILE", help="write the time of each operator in the last step")
    options.add_argument("--dry-run", action="store_true", help="a tiny model and few tokens, on whatever device there is")
    asked = options.parse_args()
    quiet()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only the answer goes to the original stdout
    case = next(case for case in CASES if case.name == asked.case)
    case = case.tiny() if asked.dry_run else case
    model = model_of(case, dry=asked.dry_run)
    values, _ = catalogue.find_config(model)
    device = find_device(asked.trace, GPUS) if asked.trace else this_device(GPUS)
    recipe, rows = recipe_of(case, model, device.kind), rows_of(case, values["vocab_size"])
    plan = planned(case, recipe, rows, device)
    scenario, promise = promised(case, plan)
    described = {"part": case.name, "side": case.side, "tables": case.tables, "model": case.model, "method": case.method}
    described |= {"rows": case.rows, "length": case.length, "shared": case.shared, "train": dict(case.train)}
    if asked.calibrate:
        entries = calibrate(recipe, plan.facts, device, [case.method], Console(stderr=True), free=False)
        line: dict[str, Any] = {"calibration": [asdict(entry) for entry in entries]}
    elif asked.trace:
        line = {**described, **promise, "device": device.name, "traced_bytes": traced(case, plan, scenario, values)}
    else:
        torch.manual_seed(0)
        if case.triton:
            os.environ[triton.SWITCH] = "1"
        meter = Meter(case, asked.profile)
        if case.side == "tunesmith":
            measured = train_ours(case, scenario, values, rows, plan, meter)
        else:
            measured = (train_stock if case.side == "stock" else train_trl)(case, scenario, values, rows, meter)
        line = {**described, **promise, **measured}
    print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
