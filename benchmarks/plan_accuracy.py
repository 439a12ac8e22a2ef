"""Accuracy of the plan: closed form against trace, both against PyTorch's allocation events, time against runs.

    python benchmarks/plan_accuracy.py --json benchmarks/results/plan_accuracy.json     # about half an hour on two cores

`--only NAME` runs one part (formula, memory, time, starts, table) and leaves the other results in the file unchanged.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import claim, merged, parser, report
from rich.console import Console
from transformers import AutoConfig

import tunesmith
from tunesmith.demo import write_input
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.optim.adamw import AdamW
from tunesmith.engine.packing.batch import Batch, collate_tree
from tunesmith.hardware.catalogue import read_gpus, this_device
from tunesmith.methods import make_method
from tunesmith.models import builtin
from tunesmith.models.catalogue import find_config, known_models
from tunesmith.models.families import read_architecture
from tunesmith.models.load import make_config
from tunesmith.pipeline import with_method
from tunesmith.planner.bytes.step import estimate
from tunesmith.planner.calibrate import calibrate
from tunesmith.planner.datafacts import prepared_facts
from tunesmith.planner.plan import plan_for
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.trace import trace
from tunesmith.recipe import Method, load_recipe

MODELS = ("Qwen/Qwen2-7B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3", "google/gemma-7b", "Qwen/Qwen3-8B")
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
LENGTHS = (512, 2048)
MEASURED_LENGTHS = (256, 1024)
STEPS = 6
ROUNDS = 3
#: Bytes that a step may leave behind without casting doubt on its peak: the loss and other scalars.
LEFT_BYTES = 1 << 20

Row = dict[str, Any]
Part = Callable[[], tuple[list[dict[str, Any]], list[Row]]]


def _config(name: str) -> Any:
    return make_config(find_config(name)[0])


def percent(value: float, reference: float) -> float:
    """The difference of `value` from `reference`, in percent."""
    return 100 * (value / reference - 1)


def formula() -> tuple[list[dict[str, Any]], list[Row]]:
    """Closed form against the trace of the real modules, on models of 7 to 9 B parameters."""
    rows = []
    for name, method, checkpointing, length in itertools.product(MODELS, METHODS, (False, True), LENGTHS):
        scenario = Scenario(
            method, rows=1, length=length, labelled=length // 2, gradient_checkpointing=checkpointing, optim="adamw"
        )
        traced = trace(_config(name), scenario).total_bytes
        made = estimate(read_architecture(known_models()[name]), scenario).total_bytes
        rows.append(
            {
                "part": "formula",
                "model": name,
                "method": method,
                "gradient_checkpointing": checkpointing,
                "tokens": length,
                "trace_bytes": traced,
                "formula_bytes": made,
                "error_percent": percent(made, traced),
            }
        )
        print(f"{name:28} {method:6} {checkpointing!s:5} {length:5} {rows[-1]['error_percent']:+.3f} %", flush=True)
    errors = [row["error_percent"] for row in rows]
    return [
        claim("formula_vs_trace_max_error_percent", max(map(abs, errors)), "%"),
        claim("formula_under_trace_max_percent", max(0.0, -min(errors)), "%"),
    ], rows


def _batch(tokens: int) -> Batch:
    """One row of distinct tokens, half of them labelled."""
    ids = [1 + (7 * place) % 49_000 for place in range(tokens)]
    return collate_tree([{"input_ids": ids, "loss_mask": [place >= tokens // 2 for place in range(tokens)]}])


def allocated_peak(method_name: str, *, tokens: int, checkpointing: bool) -> int:
    """Peak bytes of a real step of the built-in model, by PyTorch's own allocation events on CPU."""
    resolved = load_recipe(
        write_input(Path(tempfile.mkdtemp())), [f"train.gradient_checkpointing={str(checkpointing).lower()}"]
    )
    recipe = with_method(resolved, method_name).recipe
    model = make_method(recipe, builtin.ensure(), compute_dtype="bfloat16", r=16, lora_alpha=32).build().train()
    use_tree_attention(model, on=True)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    batch = _batch(tokens)

    def step() -> None:
        summed_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()  # an earlier model freed inside the profile would distort the count
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors(model, optimizer, batch)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    if abs(live) > LEFT_BYTES:
        raise RuntimeError(f"{live} bytes more are held after the step than before it: the peak above is not this step's")
    return sum(held.values()) + peak


def _tensors(model: Any, optimizer: AdamW, batch: Batch) -> list[torch.Tensor]:
    """All tensors held between two steps."""
    found = [*model.parameters(), *model.buffers(), *(value for value in batch.values() if isinstance(value, torch.Tensor))]
    for state in optimizer.state.values():
        found += [*state["exp_avg"].tensors(), *state["exp_avg_sq"].tensors(), state["master"]]
    for parameter in model.parameters():
        quantised = getattr(parameter, "quant_state", None)
        if quantised is not None:
            found += [quantised.absmax, quantised.code, quantised.offset, quantised.state2.absmax, quantised.state2.code]
    return [tensor for tensor in found if tensor is not None]


def memory() -> tuple[list[dict[str, Any]], list[Row]]:
    """Trace and closed form against what a real step of the built-in model allocates."""
    rows = []
    architecture = read_architecture(find_config(builtin.NAME)[0])
    config = AutoConfig.from_pretrained(builtin.ensure())
    for method, tokens, checkpointing in itertools.product(METHODS, MEASURED_LENGTHS, (False, True)):
        scenario = Scenario(
            method, rows=1, length=tokens, labelled=tokens // 2, gradient_checkpointing=checkpointing, attention="tree"
        )
        measured = allocated_peak(method, tokens=tokens, checkpointing=checkpointing)
        traced, made = trace(config, scenario).total_bytes, estimate(architecture, scenario).total_bytes
        rows.append(
            {
                "part": "memory",
                "method": method,
                "tokens": tokens,
                "gradient_checkpointing": checkpointing,
                "measured_bytes": measured,
                "trace_error_percent": percent(traced, measured),
                "plan_error_percent": percent(made, measured),
            }
        )
        print(rows[-1], flush=True)
    return [
        claim("trace_vs_measured_cpu_max_error_percent", max(abs(row["trace_error_percent"]) for row in rows), "%"),
        claim("plan_vs_measured_cpu_max_error_percent", max(abs(row["plan_error_percent"]) for row in rows), "%"),
    ], rows


def timing() -> tuple[list[dict[str, Any]], list[Row]]:
    """Calibrate, train, calibrate, train ...: predicted and measured seconds of a step, medians over the rounds."""
    rows = []
    for size, method in itertools.product((4, 16), METHODS):
        rounds = [_predict_and_train(method, size) for _ in range(ROUNDS)]
        predicted, measured, planned, used = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append(
            {
                "part": "time",
                "method": method,
                "micro_batch": size,
                "predicted_seconds": predicted,
                "measured_seconds": measured,
                "error_percent": percent(predicted, measured),
                "rounds": [each[:2] for each in rounds],
                "predicted_process_bytes": planned,
                "measured_process_bytes": used,
                "process_memory_error_percent": percent(planned, used),
            }
        )
        print(rows[-1], flush=True)
    return [claim("step_time_max_error_percent", max(abs(row["error_percent"]) for row in rows), "%")], rows


def _predict_and_train(method: Method, size: int) -> tuple[float, float, float, float]:
    """Seconds per step, predicted after a calibration and measured in a run; process bytes, planned and measured."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"train.max_steps={STEPS}", "lora.r=16", f"train.per_device_train_batch_size={size}"]
        overrides += [f"train.effective_batch_size={size}"]
        resolved = with_method(load_recipe(write_input(Path(scratch) / "input", test_rows=4), overrides), method)
        run = tunesmith.create_run(resolved, Path(scratch) / "run")
        tunesmith.prepare(run)
        gpus = read_gpus()
        device, facts = this_device(gpus), prepared_facts(run.path / "data")
        entries = calibrate(resolved.recipe, facts, device, [method], Console(stderr=True), free=False)
        made = plan_for(resolved.recipe, facts, device, gpus, methods=[method], free=False, entries=entries)
        command = [sys.executable, "-m", "tunesmith", "train", str(run.path)]
        subprocess.run(command, check=True, capture_output=True)
        summary = tunesmith.train(run)
    option = made.options[method]
    return option.seconds_per_step, summary["seconds_per_step"], option.peak_memory_bytes, summary["peak_memory_bytes"]


def _wall(command: Sequence[str], repeats: int = 3) -> float:
    """Median seconds of a command, end to end."""
    times = []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            begun = time.perf_counter()
            subprocess.run([*command, "--out", str(Path(scratch) / "plan")], check=False, capture_output=True)
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def starts() -> tuple[list[dict[str, Any]], list[Row]]:
    """Wall time of the command for a 405 B model, and of the trace of a 7 B model."""
    plan = [sys.executable, "-m", "tunesmith", "plan"]
    large = _wall([*plan, "meta-llama/Llama-3.1-405B", "--gpu", "8xH100"])
    traced = _wall([*plan, "Qwen/Qwen2-7B", "--gpu", "24GB", "--trace"], repeats=1)
    return [claim("plan_seconds_405b", large, "s"), claim("trace_seconds_7b", traced, "s")], []


def table() -> tuple[list[dict[str, Any]], list[Row]]:
    """The published row: Qwen2-7B, one row of 2,048 tokens, checkpointing; traced, with the engine's options."""
    base: dict[str, Any] = {"rows": 1, "length": 2048, "labelled": 2047, "gradient_checkpointing": True}
    wanted = {
        "qlora": {"method": "qlora"},
        "lora": {"method": "lora"},
        "full_fused": {"method": "full", "optim": "adamw_torch_fused"},
        "full_lean": {"method": "full", "optim": "adamw_8bit", "optimizer_in_backward": True},
        "stock_qlora": {"method": "qlora", "optim": "adamw_torch_fused", "stock": True},
        "stock_lora": {"method": "lora", "optim": "adamw_torch_fused", "stock": True},
        "stock_full": {"method": "full", "optim": "adamw_torch_fused", "stock": True},
    }
    claims, rows = [], []
    architecture = read_architecture(known_models()["Qwen/Qwen2-7B"])
    for name, how in wanted.items():
        scenario = Scenario(**{**base, **how})
        traced, made = trace(_config("Qwen/Qwen2-7B"), scenario), estimate(architecture, scenario)
        claims.append(claim(f"qwen2_7b_{name}_gib", traced.total_bytes / 2**30, "GiB"))
        rows.append({"part": "table", "name": name, "formula_gib": made.total_bytes / 2**30, "breakdown": made.breakdown})
    return claims, rows


PARTS: dict[str, Part] = {"table": table, "starts": starts, "memory": memory, "time": timing, "formula": formula}


def main() -> None:
    """Run the parts and report."""
    options = parser(__doc__ or "")
    options.add_argument("--only", choices=sorted(PARTS), action="append")
    asked = options.parse_args()
    claims: list[dict[str, Any]] = []
    rows: list[Row] = []
    for name in asked.only or PARTS:
        made, found = PARTS[name]()
        claims += made
        rows += found
    if asked.only:
        claims, rows = merged(asked.json, claims, rows)
    report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
