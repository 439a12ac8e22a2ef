"""Training other than its loss, step by step, compared with plain PyTorch on the same rows.

The reference below knows nothing of tunesmith: transformers' model with eager attention, one row at a time, torch's AdamW, and
formulas written here. Row order is read from metrics.jsonl, since each row has a unique number of tokens.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tests.support.bench import (
    BASE,
    QUIET,
    SEED,
    Bench,
    Rows,
    Weights,
    byte_model,
    checkpoint,
    little_work,
    losses_of,
    many_rows,
    mean_loss,
    seven_rows,
    stored,
)
from tunesmith.errors import RunError, TrainError
from tunesmith.io.atomic import read_json
from tunesmith.methods.base import AdapterSettings
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.methods.reward_model import build_reward_model
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train
from tunesmith.stages.train.loops.ppo import _order
from tunesmith.stages.train.savepoints import KEPT, Savepoints


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with little_work():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(folder, byte_model(folder / "bytes"))


def metrics(run: Run) -> Rows:
    return read_jsonl(run.path / "train" / "metrics.jsonl")


def row_sets(run: Run, batch: int, count: int = 7) -> list[list[int]]:
    """The rows of each step, as indices into train.arrow, found by the sum of their tokens."""
    lengths = [len(row["input_ids"]) for row in stored(run)]
    assert sorted(lengths) == [BASE + 2**number for number in range(count)]
    places = {length - BASE: place for place, length in enumerate(lengths)}
    sizes = [batch] * (count // batch) + ([count % batch] if count % batch else [])
    found = []
    for number, line in enumerate(metrics(run)):
        rest = line["tokens"] - BASE * sizes[number % len(sizes)]
        found.append([places[2**bit] for bit in range(count) if rest >> bit & 1])
        assert len(found[-1]) == sizes[number % len(sizes)]
    return found


def rate(kind: str, step: int, warmup: int, steps: int) -> float:
    """Fraction of the peak rate at a step, from 0 on: transformers' four schedules, as documented."""
    if kind != "constant" and step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}.get(kind, 1.0)


@dataclass
class Told:
    """A reference step's loss and gradient norm, before its update."""

    loss: float
    norm: float


def reference(
    model: torch.nn.Module,
    batches: Sequence[Sequence[Mapping[str, Any]]],
    rates: Sequence[float],
    *,
    decay: float,
    most: float,
    apart: bool = False,
) -> Iterator[Told]:
    """torch's AdamW over the batches; decay only on matrices; clipped over all parameters together, or each one if `apart`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.999), eps=1e-8)
    for rows, now in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        loss = mean_loss(model, rows)
        loss.backward()
        square = sum(float(parameter.grad.double().square().sum()) for parameter in trained if parameter.grad is not None)
        yield Told(float(loss.detach()), math.sqrt(square))
        for each in [[parameter] for parameter in trained] if apart else [trained]:
            torch.nn.utils.clip_grad_norm_(each, most)
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def moved_alike(run: Run, start: Weights, wanted: Weights) -> None:
    """Assert that each tensor has moved from its start as in the reference, within a thousandth of the update."""
    (file,) = checkpoint(run).glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        way = (wanted[name] - start[name]).norm()
        assert way > 0, name
        assert (weight - wanted[name]).norm() < 2e-3 * way, name


def weights_of(model: torch.nn.Module) -> Weights:
    """The parameters, each once and by its name in a checkpoint."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


#: Gradients unclipped, partly clipped, or all clipped to nearly zero, where AdamW's epsilon makes their size matter.
CASES: dict[str, dict[str, Any]] = {
    "cosine, decay, accumulated": {"lr_scheduler_type": "cosine", "per_device_train_batch_size": 1, "weight_decay": 0.5},
    "linear, clipped to little": {"lr_scheduler_type": "linear", "max_grad_norm": 2e-6, "per_device_train_batch_size": 2},
    "constant with warm-up, some clipped": {"lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 4.0},
    "constant, padded": {"lr_scheduler_type": "constant", "packing": False, "max_grad_norm": 1e-5, "weight_decay": 0.2},
}
STEPS = 8
WARM = 3  # 0.3 of the steps, rounded up


def held(run: Run, model: torch.nn.Module, batch: int, *, apart: bool = False) -> list[Told]:
    """Compare each line of metrics.jsonl with the reference, which updates `model`; returns the reference's steps."""
    asked, rows, lines = run.recipe.train, stored(run), metrics(run)
    batches = [[rows[place] for place in step] for step in row_sets(run, batch)]
    rates = [0.01 * rate(asked.lr_scheduler_type, step, WARM, STEPS) for step in range(STEPS)]
    told = list(reference(model, batches, rates, decay=asked.weight_decay, most=asked.max_grad_norm, apart=apart))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-6, abs=1e-12)
    assert [line["loss"] for line in lines] == pytest.approx([each.loss for each in told], rel=2e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([each.norm for each in told], rel=2e-4)
    return told


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_torch(bench: Bench, name: str) -> None:
    """Loss, gradient norm and rate of every step, and the weights after the last, match torch's own functions."""
    run = bench.trained(seven_rows(), max_steps=STEPS, warmup_ratio=0.3, effective_batch_size=3, **CASES[name])
    model = base_model(bench.model)
    start = weights_of(model)
    norms = [each.norm for each in held(run, model, 3)]
    if "some clipped" in name:
        assert min(norms) < 0.8 * run.recipe.train.max_grad_norm < 1.2 * run.recipe.train.max_grad_norm < max(norms)
    moved_alike(run, start, weights_of(model))


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_updates_in_the_backward_pass_clip_each_gradient_alone(bench: Bench, kind: str) -> None:
    """The reported norm is over all of them before clipping; the rate is the step's."""
    asked = {"optimizer_in_backward": True, "per_device_train_batch_size": 3, "max_grad_norm": 1e-5, "weight_decay": 0.3}
    run = bench.trained(seven_rows(), max_steps=STEPS, warmup_ratio=0.3, lr_scheduler_type=kind, **asked)
    model = base_model(bench.model)
    start = weights_of(model)
    held(run, model, 3, apart=True)
    moved_alike(run, start, weights_of(model))


# --- new weights ---


def adapters_of(model: torch.nn.Module, side: str) -> Weights:
    return {name.replace(".default", ""): each for name, each in weights_of(model).items() if f"lora_{side}" in name}


def method_of(kind: type[Full | Lora], folder: Path, seed: int) -> Full | Lora:
    asked = AdapterSettings(r=4, lora_alpha=6, lora_dropout=0.0, target_modules="all-linear", use_rslora=False, seed=seed)
    return kind(folder, "float32", asked)


def test_an_adapter_trains_as_pefts_does(bench: Bench) -> None:
    """Only A and B of every linear layer except the head; both decay, since they are matrices; B x is scaled by alpha / r."""
    asked = {"max_grad_norm": 7.0, "weight_decay": 0.4, "per_device_train_batch_size": 1, "lr_scheduler_type": "linear"}
    shape = "lora: {r: 4, lora_alpha: 6}\n"
    run = bench.trained(seven_rows(), "lora", max_steps=STEPS, warmup_ratio=0.3, effective_batch_size=3, lora=shape, **asked)
    torch.manual_seed(SEED)
    plain = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(bench.model), plain)
    start = adapters_of(model, "A") | adapters_of(model, "B")
    assert len(start) == 2 * 2 * 7  # of two blocks' seven linear layers
    held(run, model, 3)
    moved_alike(run, start, adapters_of(model, "A") | adapters_of(model, "B"))


@pytest.mark.parametrize("seed", [SEED, 6])
def test_the_recipes_seed_decides_the_adapter(bench: Bench, seed: int) -> None:
    """A first step at rate 0 leaves the adapter's initialisation: PEFT's own for that seed, whatever was drawn before."""
    shape = "lora: {r: 4, lora_alpha: 6}\n"
    run = bench.trained(seven_rows(), "lora", seed=seed, max_steps=1, warmup_ratio=0.5, lora=shape)
    assert [line["learning_rate"] for line in metrics(run)] == [0.0]
    (file,) = checkpoint(run).glob("*.safetensors")
    saved = load_file(file)
    starts = {}
    for other in (SEED, 6):
        torch.manual_seed(other)
        plain = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        starts[other] = adapters_of(get_peft_model(base_model(bench.model), plain), "A")
    for name, down in starts[seed].items():
        assert torch.equal(saved[name], down)
        assert not torch.equal(saved[name], starts[SEED + 6 - seed][name])
        assert float(saved[name.replace("lora_A", "lora_B")].abs().max()) == 0
        assert 0.8 < float(down.abs().max()) * math.sqrt(down.shape[1]) <= 1  # uniform within 1 / sqrt(inputs)


@pytest.mark.parametrize("kind", [Full, Lora])
def test_a_seed_decides_a_reward_models_head(bench: Bench, kind: type[Full | Lora]) -> None:
    """The head is drawn from N(0, 0.02), and all new weights are the same for a seed, whatever was drawn before."""
    made = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(100 + number)
        random.seed(100 + number)
        made.append(weights_of(build_reward_model(method_of(kind, bench.model, seed), pad_token_id=257)))
    first, again, other = made
    new = [name for name in first if "score" in name or "lora_A" in name]
    assert len(new) == (1 if kind is Full else 15)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in new)
    (head,) = (first[name] for name in new if "score" in name)
    assert head.shape == (1, 32)
    assert 0.012 < float(head.std()) < 0.03


# --- the order of rows ---


def orders(run: Run, batch: int = 1) -> list[list[int]]:
    """For each epoch, all rows in training order."""
    steps = row_sets(run, batch)
    each = math.ceil(7 / batch)
    assert len(steps) % each == 0
    return [[row for step in steps[begin : begin + each] for row in step] for begin in range(0, len(steps), each)]


def test_every_row_once_an_epoch_in_a_seeded_order(bench: Bench) -> None:
    asked = {"num_train_epochs": 3, "effective_batch_size": 1}
    first, again, other = (orders(bench.trained(seven_rows(), seed=seed, **asked)) for seed in (SEED, SEED, 50))
    for order in (*first, *other):
        assert sorted(order) == list(range(7))
        assert order != list(range(7))
    assert len({tuple(order) for order in (*first, *other)}) == 6
    assert again == first


def test_an_epochs_last_step_has_the_rows_that_are_left(bench: Bench) -> None:
    """Seven rows in batches of three are steps of 3, 3 and 1, so three epochs are nine steps and two and a half are eight."""
    run = bench.trained(seven_rows(), num_train_epochs=3, effective_batch_size=3)
    assert [len(step) for step in row_sets(run, 3)] == [3, 3, 1] * 3
    assert [sorted(order) for order in orders(run, 3)] == [list(range(7))] * 3
    half = bench.trained(seven_rows(), num_train_epochs=2.5, effective_batch_size=3)
    assert row_sets(half, 3) == row_sets(run, 3)[:8]


def test_ppos_prompts_come_once_an_epoch_in_a_seeded_order() -> None:
    def epochs(seed: int) -> list[tuple[int, ...]]:
        order = _order(9, seed)
        return [tuple(next(order) for _ in range(9)) for _ in range(3)]

    assert all(sorted(epoch) == list(range(9)) for epoch in epochs(1))
    assert len({*epochs(1), *epochs(2), tuple(range(9))}) == 7
    assert epochs(1) == epochs(1)


# --- a reward model's steps, which TRL runs ---


def test_a_reward_models_steps_are_those_of_torch(bench: Bench) -> None:
    """All four pairs in each step, so their order does not matter: -log sigmoid(chosen - rejected), and the same AdamW."""
    pytest.importorskip("trl", reason="the extra tunesmith[trl] is not installed")
    words = (("k", "vvv", "z"), ("jj", "w", "uuuu"), ("y", "kkkkk", "v"), ("zzz", "j", "ww"))
    pairs = [{"prompt": asked, "chosen": good, "rejected": bad} for asked, good, bad in words]
    file = bench.folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    steps, peak, decay, most = 5, 0.01, 0.4, 1e-4
    text = f"model: {bench.model}\nmethod: full\nobjective: reward\nseed: {SEED}\ndata: {{train: {file}, heldout: 0}}\n"
    text += (
        f"train: {{max_steps: {steps}, learning_rate: {peak}, weight_decay: {decay}, max_grad_norm: {most}, warmup_ratio: 0.4,"
    )
    text += " effective_batch_size: 4, per_device_train_batch_size: 2, compute_dtype: float32, lr_scheduler_type: cosine}\n"
    run = create_run(parse_recipe(text, "recipe.yaml", bench.folder), bench.folder / "run-reward")
    prepare(run)
    train(run, QUIET)

    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        bench.model, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.pad_token_id = 257
    start = weights_of(model)
    groups = [
        {"params": [each for each in model.parameters() if each.ndim >= 2], "weight_decay": decay},
        {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    rates = [peak * share for share in (0, 1 / 2, 1, 3 / 4, 1 / 4)]  # up in two steps, down by half a cosine
    told = []
    for now in rates:
        optimizer.zero_grad()
        gaps = [
            model(input_ids=torch.tensor([row["input_ids"]])).logits
            - model(input_ids=torch.tensor([row["rejected_input_ids"]])).logits
            for row in stored(run)
        ]
        loss = -torch.cat(gaps).sigmoid().log().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        told.append((float(loss.detach()), float(norm)))
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()
    lines = metrics(run)
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in told], rel=2e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx([norm for _, norm in told], rel=1e-3)
    moved_alike(run, start, weights_of(model))


# --- the held-out loss ---


def test_the_held_out_loss_is_a_mean_over_labels(bench: Bench) -> None:
    """After every second step and the last one, over more rows than are packed at a time."""
    run = bench.trained(many_rows(), heldout=0.95, max_steps=5, eval_steps=2, effective_batch_size=50)
    train_rows, heldout = stored(run), stored(run, "heldout")
    assert len(train_rows) < 20
    assert len(heldout) > 128  # the rows that are packed at a time
    model = base_model(bench.model)
    rates = [0.01 * rate("cosine", step, 0, 5) for step in range(5)]
    expected = {}
    steps = reference(model, [train_rows] * 5, rates, decay=0.0, most=1.0)
    for done, told in enumerate(steps):
        assert metrics(run)[done]["loss"] == pytest.approx(told.loss, rel=2e-5)
        expected[done] = float(mean_loss(model, heldout).detach())
    expected[5] = float(mean_loss(model, heldout).detach())
    looks = read_jsonl(run.path / "train" / "evals.jsonl")
    assert [look["step"] for look in looks] == [2, 4, 5]
    assert [look["eval_loss"] for look in looks] == pytest.approx([expected[step] for step in (2, 4, 5)], rel=2e-5)
    by_row = sum(float(each.detach().mean()) for each in losses_of(model, heldout)) / len(heldout)
    assert abs(by_row - expected[5]) > 0.01
    summary = read_json(run.path / "train" / "summary.json")
    best = min(looks, key=lambda look: look["eval_loss"])
    assert (summary["best_step"], summary["best_eval_loss"]) == (best["step"], best["eval_loss"])
    assert summary["last_eval_loss"] == looks[-1]["eval_loss"]


@pytest.mark.parametrize("every", [1, 2])
def test_the_train_loss_of_a_look_is_of_the_steps_since_the_look_before(bench: Bench, every: int) -> None:
    run = bench.trained(many_rows(), heldout=0.95, max_steps=4, eval_steps=every, effective_batch_size=5)
    losses = [line["loss"] for line in metrics(run)]
    wanted = [sum(losses[begin : begin + every]) / every for begin in range(0, 4, every)]
    assert [look["train_loss"] for look in read_jsonl(run.path / "train" / "evals.jsonl")] == pytest.approx(wanted)


def test_nothing_is_dropped_while_the_held_out_loss_is_taken(bench: Bench) -> None:
    """The held-out loss of the best checkpoint's step equals that of its weights without dropout."""
    lora = "lora: {r: 4, lora_alpha: 16, lora_dropout: 0.5}\n"
    asked = {"max_steps": 4, "eval_steps": 2, "effective_batch_size": 50, "learning_rate": 0.05}
    run = bench.trained(many_rows(), "lora", heldout=0.95, lora=lora, **asked)
    summary = read_json(run.path / "train" / "summary.json")
    looks = {look["step"]: look["eval_loss"] for look in read_jsonl(run.path / "train" / "evals.jsonl")}
    model = PeftModel.from_pretrained(base_model(bench.model), checkpoint(run)).eval()
    wanted = float(mean_loss(model, stored(run, "heldout")).detach())
    assert looks[summary["best_step"]] == pytest.approx(wanted, rel=2e-5)
    untrained = float(mean_loss(base_model(bench.model), stored(run, "heldout")).detach())
    assert abs(untrained - wanted) > 0.05


# --- one process at a time ---

HOLDER = """
import sys, time
from pathlib import Path
from tunesmith.runs import open_run
with open_run(Path(sys.argv[1])).perform("evaluate", "work", {}) as folder:
    (folder / "half").write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""


def files_of(run: Run) -> dict[str, bytes]:
    """A run's files, except the lock and uncommitted ones."""
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file() and "/." not in str(path)}


def turned_away(run: Run, name: str) -> None:
    """Both kinds of stage are refused immediately, before they change anything; the error names who is working on the run."""
    before = files_of(run)
    for stage, live in (
        ("evaluate", ()),
        ("train", ("metrics.jsonl", "summary.json", "settings.json", "events.jsonl", "checkpoints")),
    ):
        begun = time.perf_counter()
        with (
            pytest.raises(RunError, match=f"{name} on .* is working on this run") as caught,
            run.perform(stage, stage, {}, live=live),
        ):
            pytest.fail("two work on one run")
        assert time.perf_counter() - begun < 1
        assert [problem.code for problem in caught.value.problems] == ["TS014"]
    assert files_of(run) == before


def comes_in(run: Run) -> None:
    with run.perform("evaluate", "work", {}) as folder:
        (folder / "whole").write_text("whole", encoding="utf-8")
    assert [path.name for path in (run.path / "work").iterdir() if not path.name.startswith(".")] == ["whole"]


def test_a_second_process_is_turned_away_and_comes_in_when_the_first_dies(bench: Bench) -> None:
    run, another = bench.trained(seven_rows(), max_steps=1), bench.run(seven_rows())
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            turned_away(run, f"process {holder.pid}")
            comes_in(another)
        finally:
            holder.kill()
    comes_in(run)


def test_a_stage_that_ends_badly_frees_the_run(bench: Bench) -> None:
    run = bench.trained(seven_rows(), max_steps=1)

    def fail() -> None:
        with run.perform("evaluate", "work", {}):
            turned_away(run, f"process {os.getpid()}")  # even if it is the same process
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    comes_in(run)


# --- room for what is saved ---

MARGIN = 64 * 2**20  # bytes that must stay free in addition to a savepoint


def no_room(caught: pytest.ExceptionInfo[TrainError]) -> tuple[int, int]:
    """The needed and free bytes from the error."""
    (problem,) = caught.value.problems
    assert problem.code == "TS310"
    found = re.search(r"([\d,]+) bytes are needed, ([\d,]+) are free", problem.what)
    assert found is not None
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def test_what_no_disk_holds_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """Expanded tensors of slightly more than 2^51 bytes, which are never materialised."""
    large = {"a": torch.zeros(1).expand(2**48), "b": torch.zeros(1, dtype=torch.bfloat16).expand(2**49)}
    tensors = {"weights": large, "optimizer": {"step": torch.tensor([3]), "bytes": torch.zeros(5, dtype=torch.uint8)}}
    with pytest.raises(TrainError) as caught:
        Savepoints(tmp_path, lambda *_: None).write(tensors, {"more.json": "{}"}, {"step": 1})
    needed, free = no_room(caught)
    assert needed == 4 * 2**48 + 2 * 2**49 + 8 + 5
    assert abs(free - shutil.disk_usage(tmp_path).free) < 2**30
    assert list(tmp_path.iterdir()) == []


def of_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Make the file system report `free` free bytes."""
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free + 1, 1, free))


@pytest.mark.parametrize(("more", "fits"), [(0, True), (-1, False)])
def test_a_savepoint_needs_its_bytes_and_a_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, fits: bool
) -> None:
    tensors = {"weights": {"a": torch.ones(100), "b": torch.ones(7, dtype=torch.bfloat16)}}
    savepoints = Savepoints(tmp_path, lambda *_: None)
    before = savepoints.write(tensors, {}, {"step": 1})
    of_free(monkeypatch, 414 + MARGIN + more)
    if fits:
        assert savepoints.write(tensors, {}, {"step": 2}).is_dir()
    else:
        with pytest.raises(TrainError) as caught:
            savepoints.write(tensors, {}, {"step": 2})
        assert no_room(caught) == (414, 413 + MARGIN)
        assert list(tmp_path.iterdir()) == [before]


def test_the_last_savepoints_stay_and_the_last_at_multiples(tmp_path: Path) -> None:
    """After a signal there are extra savepoints in between; a rollback needs one at a regular multiple."""
    savepoints = Savepoints(tmp_path, lambda *_: None, every=10)
    kept = []
    for step in (5, 10, 20, 30, 31, 32, 33):
        savepoints.write({"weights": {"a": torch.ones(1)}}, {}, {"step": step})
        kept.append(sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()))
    assert KEPT == 2
    assert kept == [[5], [5, 10], [10, 20], [20, 30], [20, 30, 31], [20, 30, 31, 32], [20, 30, 32, 33]]
    newest = savepoints.newest(10)
    assert newest is not None
    assert newest.step == 30


#: Bytes of the random generators' states: Python's and NumPy's words as int64, and torch's.
GENERATORS = 625 * 8 + 624 * 8 + 5056


@pytest.mark.parametrize(
    ("method", "dtype", "each"), [("full", "float32", 12), ("full", "bfloat16", 14), ("lora", "bfloat16", 12)]
)
def test_a_training_tells_what_its_savepoint_needs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str, each: int
) -> None:
    """A weight, its two moments and a bf16 weight's master; a step count per tensor; the generators' states."""
    model = base_model(bench.model)
    counts = [parameter.numel() for parameter in model.parameters()]
    if method == "lora":
        linear = [
            module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name
        ]
        counts = [4 * size for module in linear for size in (module.in_features, module.out_features)]
    run = bench.run(seven_rows(), method, max_steps=3, save_steps=1, compute_dtype=dtype, lora="lora: {r: 4}\n")
    of_free(monkeypatch, 1000)
    with pytest.raises(TrainError) as caught:
        train(run, QUIET)
    assert no_room(caught) == (each * sum(counts) + 8 * len(counts) + 5056 + GENERATORS, 1000)
    assert list((run.path / "train").glob("*/step-*")) == []
    assert run.status()["stages"]["train"]["status"] == "failed"
