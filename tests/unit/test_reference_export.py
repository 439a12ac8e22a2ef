"""Export's weights and proof, against weights merged by hand in float64 and predictions by plain transformers."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.bench import Bench, Rows, Weights, byte_model, chat, checkpoint, little_work, mean_loss, seven_rows, stored
from tunesmith.errors import ExportError
from tunesmith.io.atomic import read_json
from tunesmith.methods.lora import Lora
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run
from tunesmith.stages.export import export
from tunesmith.stages.export.stage import compare_probabilities
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with little_work():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(folder, byte_model(folder / "bytes"))


SHAPES = {
    "plain": ("lora: {r: 4, lora_alpha: 12}\n", 12 / 4),
    "rslora": ("lora: {r: 4, lora_alpha: 6, use_rslora: true}\n", 6 / 2),
}


def merged_by_hand(run: Run, folder: Path, scale: float, dtype: torch.dtype) -> Weights:
    """W + scale B A in float64, with the base as used in training: rounded to its dtype, or quantised to NF4."""
    base, adapter = load_file(folder / "model.safetensors"), load_file(checkpoint(run) / "adapter_model.safetensors")
    made = {}
    for name, weight in base.items():
        key = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
        seen = weight.to(dtype)
        if key.format("A") in adapter:
            if run.recipe.method == "qlora":
                seen = dequantize_4bit(*quantize_4bit(seen, blocksize=64, compress_statistics=True, quant_type="nf4"))
            made[name] = seen.double() + scale * adapter[key.format("B")].double() @ adapter[key.format("A")].double()
        else:
            made[name] = seen.double()
    assert sum("lora_A" in name for name in adapter) == 14
    return made


def held_to_odds(share: torch.Tensor, up: torch.Tensor) -> None:
    """The number rounded up matches the fractions, within five deviations; so does the number rounded to the further side."""
    deviation = math.sqrt(float((share * (1 - share)).sum()))
    assert abs(float((up - share).sum())) <= 5 * deviation
    distance, further = torch.minimum(share, 1 - share), (up != (share >= 0.5)).double()
    assert abs(float((further - distance).sum())) <= 5 * deviation


def held_to_rounding(exact: Weights, written: Weights) -> dict[int, int]:
    """Each weight is one of the two bfloat16 neighbours of the exact one, with probabilities given by the distance.

    Rounding to nearest would never take the further one; rounding twice moves values close to a neighbour onto it. Returns
    how many weights lay between two neighbours, by their number of dimensions.
    """
    assert written.keys() == exact.keys()
    shares: dict[int, list[torch.Tensor]] = {1: [], 2: []}  # by number of dimensions: norms and biases, and matrices
    ups: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for name, wanted in exact.items():
        assert written[name].dtype == torch.bfloat16
        size, found = wanted.abs(), written[name].double()
        step = torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-30))) - 7)  # eight bits of mantissa, one of them implicit
        low = torch.floor(size / step) * step
        share, above = (size - low) / step, (found.abs() - low) / step
        slack = 1e-3 + 1e-7 / step  # the merge is computed in float32
        assert bool((found * wanted >= 0).all()), name
        assert bool(((above - share).abs() < 1 + slack).all()), name
        between = (share > slack) & (share < 1 - slack)
        shares[wanted.ndim].append(share[between])
        ups[wanted.ndim].append(above[between])
        assert set(ups[wanted.ndim][-1].unique().tolist()) <= {0.0, 1.0}
    for kind in (1, 2):
        share, up = torch.cat(shares[kind]), torch.cat(ups[kind])
        held_to_odds(share, up)
        for begin, end in ((0, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 1 / 2)):
            distance = torch.minimum(share, 1 - share)
            part = (distance >= begin) & (distance < end)
            held_to_odds(share[part], up[part])
    return {kind: sum(map(len, found)) for kind, found in shares.items()}


def exported(run: Run) -> Weights:
    return load_file(run.path / "export" / run.recipe.export.name / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "shape", "dtype"),
    [("lora", "plain", "float32"), ("lora", "rslora", "bfloat16"), ("qlora", "plain", "float32")],
)
def test_an_adapter_is_merged_once_and_rounded_once(bench: Bench, method: str, shape: str, dtype: str) -> None:
    keys, scale = SHAPES[shape]
    run = bench.trained(seven_rows(), method, max_steps=4, compute_dtype=dtype, lora=keys)
    export(run)
    exact = merged_by_hand(run, bench.model, scale, getattr(torch, dtype))
    assert held_to_rounding(exact, exported(run))[2] > 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_are_rounded_once(bench: Bench, dtype: str) -> None:
    """For full fine-tuning in bf16, the export rounds the float32 masters, not the already rounded weights."""
    run = bench.trained(seven_rows(), max_steps=4, compute_dtype=dtype, learning_rate=1e-4)
    export(run)
    trained = load_file(checkpoint(run) / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())
    between = held_to_rounding({name: weight.double() for name, weight in trained.items()}, exported(run))
    assert between[1] > 200
    assert between[2] > 10_000


def test_the_recipes_seed_decides_the_rounding(bench: Bench, tmp_path: Path) -> None:
    """Steps at rate 0 leave the same model for any seed."""
    first, other = (bench.trained(seven_rows(), seed=seed, max_steps=1, warmup_ratio=0.5) for seed in (5, 50))
    trained = [load_file(checkpoint(run) / "model.safetensors") for run in (first, other)]
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    again = copied(first, tmp_path)
    for run in (first, again, other):
        export(run)
    written = [exported(run) for run in (first, again, other)]
    assert all(torch.equal(weight, written[1][name]) for name, weight in written[0].items())
    assert all(not torch.equal(weight, written[2][name]) for name, weight in written[0].items() if weight.ndim == 2)


# --- the proof ---


def log_probabilities(model: Any, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) at all positions that predict a label, in float64 from float32 logits, and the labels."""
    parts, labels = [], []
    for row in rows:
        ids, told = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])[1:]
        with torch.no_grad():
            parts.append(model(input_ids=ids[None]).logits[0, :-1][told].double().log_softmax(-1))
        labels.append(ids[1:][told])
    return torch.cat(parts), torch.cat(labels)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def some_rows(count: int) -> Rows:
    draw = random.Random(3)
    texts = [["".join(draw.choices("abcdefghijklmnop", k=8)) for _ in range(2)] for _ in range(count)]
    return [chat(asked, answered[: 1 + number % 8]) for number, (asked, answered) in enumerate(texts)]


@pytest.mark.parametrize(("heldout", "least"), [(0.5, 20), (0.1, 1)])
def test_the_proofs_figures_are_those_of_plain_transformers(bench: Bench, heldout: float, least: int) -> None:
    """Over the labels of 16 rows, held-out rows first."""
    keys, _ = SHAPES["plain"]
    asked = {"max_steps": 6, "learning_rate": 0.05, "effective_batch_size": 4}
    run = bench.trained(some_rows(44), "lora", heldout=heldout, lora=keys, **asked)
    proof = export(run)
    unseen = stored(run, "heldout")
    assert least <= len(unseen) < (44 if least == 20 else 16)
    rows = [*unseen, *stored(run)][:16]
    left, labels = log_probabilities(PeftModel.from_pretrained(plain(bench.model), checkpoint(run)).eval(), rows)
    right, _ = log_probabilities(plain(run.path / "export" / "merged"), rows)
    divergence = float((left.exp() * (left - right)).sum(-1).mean())
    losses = [float(torch.nn.functional.nll_loss(side, labels)) for side in (left, right)]
    assert divergence > 1e-6
    assert (proof["method"], proof["rows"], proof["tokens"]) == ("lora", 16, len(labels))
    assert proof["mean_kl"] == pytest.approx(divergence, rel=0.02)
    assert proof["max_log_probability_difference"] == pytest.approx(float((left - right).abs().max()), rel=1e-3)
    assert proof["trained_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert proof["exported_loss"] == pytest.approx(losses[1], rel=1e-5)
    assert proof["loss_difference"] == pytest.approx(abs(losses[0] - losses[1]), abs=1e-5)
    assert proof["top1_agreement"] == pytest.approx(float((left.argmax(-1) == right.argmax(-1)).double().mean()))
    assert read_json(run.path / "export" / "merged" / "proof.json") == proof


def test_two_models_are_compared_by_the_textbook() -> None:
    """Four positions of three tokens, worked out by hand; the divergence is of the exported model from the trained one."""
    trained = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25]])
    written = torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25]])
    tokens = torch.tensor([0, 2, 1, 1])
    found = compare_probabilities((trained.log(), tokens), (written.log(), tokens))
    assert found["tokens"] == 4
    assert found["mean_kl"] == pytest.approx((0.8 * math.log(2) - 0.1 * math.log(5)) / 4, rel=1e-5)
    assert found["top1_agreement"] == 0.75
    assert found["max_log_probability_difference"] == pytest.approx(math.log(5), rel=1e-5)
    losses = [-(math.log(first) + math.log(0.5) + math.log(0.8) + math.log(0.25)) / 4 for first in (0.8, 0.4)]
    assert [found["trained_loss"], found["exported_loss"]] == pytest.approx(losses, rel=1e-5)
    assert found["loss_difference"] == pytest.approx(math.log(2) / 4, rel=1e-4)


# --- faulty models are not exported ---

TRUE_MERGE = Lora.merge


def of_adapters(model: Any) -> list[torch.Tensor]:
    found = [parameter.data for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(found) == 14
    return found


def doubled(method: Lora, model: Any) -> Any:
    for up in of_adapters(model):
        up.mul_(2)
    return TRUE_MERGE(method, model)


def taken_off(method: Lora, model: Any) -> Any:
    for up in of_adapters(model):
        up.neg_()
    return TRUE_MERGE(method, model)


def without_mlps(method: Lora, model: Any) -> Any:
    merged = TRUE_MERGE(method, model)
    for layer in merged.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    return merged


def overflowing(method: Lora, model: Any) -> Any:
    """The weights are finite, but attention's output is not."""
    merged = TRUE_MERGE(method, model)
    for layer in merged.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(1e30)
        layer.self_attn.k_proj.weight.data.mul_(1e30)
    return merged


@pytest.fixture(scope="module")
def taught(bench: Bench) -> Run:
    """A LoRA run that has moved far from its base."""
    keys, _ = SHAPES["plain"]
    asked = {"max_steps": 12, "learning_rate": 0.05, "effective_batch_size": 4}
    return bench.trained(some_rows(44), "lora", heldout=0.5, lora=keys, **asked)


def copied(run: Run, folder: Path) -> Run:
    """A copy of the run in another folder."""
    shutil.copytree(run.path, folder / "run")
    return Run(folder / "run", run.recipe)


def refused(run: Run) -> bool:
    """Whether the export is refused; checks that a refused one leaves nothing behind."""
    try:
        export(run)
    except ExportError as error:
        problems, left = [problem.code for problem in error.problems], list((run.path / "export").iterdir())
    else:
        problems, left = [], [run.path / "export" / "merged"]
    assert (problems, left) in ((["TS401"], []), ([], [run.path / "export" / "merged"]))
    return bool(problems)


@pytest.mark.parametrize("merge", [doubled, taken_off, without_mlps, pytest.param(overflowing)])
def test_a_wrong_merge_is_refused(taught: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Any) -> None:
    monkeypatch.setattr(Lora, "merge", merge)
    assert refused(copied(taught, tmp_path))


def moved(model: Any, direction: Weights, size: float) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(direction[name], alpha=size)
    return model


@pytest.mark.parametrize(
    ("by", "size", "is_refused"), [("kl", 0.0088, False), ("kl", 0.0112, True), ("loss", 0.0188, False), ("loss", 0.0212, True)]
)
def test_what_may_differ_ends_where_the_promise_does(
    taught: Run, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, size: float, is_refused: bool
) -> None:
    """0.01 nats of divergence and 0.02 of loss: weights move along or across the loss's gradient, to just below or above."""
    rows = stored(taught, "heldout")[:16]
    model = PeftModel.from_pretrained(plain(bench.model), checkpoint(taught)).merge_and_unload().requires_grad_(True)
    expected, labels = log_probabilities(model, rows)
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    mean_loss(model, rows).backward()
    direction = {name: each.grad.clone() for name, each in model.named_parameters()}
    if by == "kl":
        draw = torch.Generator().manual_seed(1)
        drawn = {name: torch.randn(each.shape, generator=draw) * each.std() for name, each in start.items()}
        share = sum(float((drawn[name] * each).sum()) for name, each in direction.items())
        share /= sum(float(each.square().sum()) for each in direction.values())
        direction = {name: drawn[name] - share * each for name, each in direction.items()}

    def apart(way: float) -> tuple[float, float]:
        """Divergence and loss difference after moving by `way`."""
        model.load_state_dict(start, strict=False)
        found, _ = log_probabilities(moved(model, direction, way), rows)
        losses = [float(torch.nn.functional.nll_loss(side, labels)) for side in (expected, found)]
        return float((expected.exp() * (expected - found)).sum(-1).mean()), abs(losses[1] - losses[0])

    low, high = 0.0, 0.5
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if apart(middle)[by == "loss"] > size else (middle, high)
    divergence, difference = apart(low)
    assert (divergence if by == "kl" else difference) == pytest.approx(size, rel=0.02)
    assert difference < 0.015 if by == "kl" else divergence < 0.008  # the other limit does not decide
    monkeypatch.setattr(Lora, "merge", lambda method, trained: moved(TRUE_MERGE(method, trained), direction, low))
    assert refused(copied(taught, tmp_path)) == is_refused


def test_a_reward_model_is_its_base_adapter_and_head(bench: Bench) -> None:
    """W + scale B A and the trained head, all in float32; the proof's share of pairs is computed from the folder."""
    pytest.importorskip("trl", reason="the extra tunesmith[trl] is not installed")
    draw = random.Random(7)
    words = [["".join(draw.choices("abcdefgh", k=size)) for size in (5, 4, 9)] for _ in range(12)]
    file = bench.folder / "pairs.jsonl"
    pairs = [{"prompt": asked, "chosen": good, "rejected": bad} for asked, good, bad in words]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    keys, scale = SHAPES["plain"]
    text = f"model: {bench.model}\nmethod: lora\nobjective: reward\ndata: {{train: {file}, heldout: 0}}\n{keys}"
    text += "train: {max_steps: 3, learning_rate: 0.02, warmup_ratio: 0, effective_batch_size: 12, compute_dtype: float32}\n"
    run = create_run(parse_recipe(text, "recipe.yaml", bench.folder), bench.folder / "reward")
    prepare(run)
    train(run, Console(quiet=True))
    proof = export(run)
    folder = run.path / "export" / "merged"
    adapter = load_file(checkpoint(run) / "adapter_model.safetensors")
    written = load_file(folder / "model.safetensors")
    exact = merged_by_hand(run, bench.model, scale, torch.float32)
    (head,) = (weight for name, weight in adapter.items() if "score" in name)
    assert torch.equal(written.pop("score.weight"), head)
    assert written.keys() == exact.keys()
    for name, weight in exact.items():
        assert written[name].dtype == torch.float32
        assert float((written[name] - weight).abs().max()) < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rewards = [
        [float(model(input_ids=torch.tensor([row[side]])).logits.detach()) for side in ("input_ids", "rejected_input_ids")]
        for row in stored(run)
    ]
    assert proof["pairs"] == 12
    assert proof["reward_accuracy"] == sum(good > bad for good, bad in rewards) / 12
    assert proof["max_reward_difference"] < 1e-4
