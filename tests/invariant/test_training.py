"""Invariants of training, run through the stages on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.training import METHODS, QUIET, MakeRecipe, metrics, trained, weights
from tunesmith.errors import RecipeError, RunError, TrainError
from tunesmith.kernels import cpu
from tunesmith.pipeline import train_apart
from tunesmith.runs import create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import is_trained, kernels, train


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    dropout = {} if method == "full" else {"lora__lora_dropout": 0.1}
    one, two = (trained(make_recipe, tmp_path / name, method=method, **dropout) for name in ("one", "two"))
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    assert metrics(one, *names) == metrics(two, *names)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = trained(make_recipe, tmp_path / "three", method=method, seed=43)
    assert metrics(one, "loss") != metrics(other, "loss")


@pytest.mark.parametrize("method", METHODS)
def test_eight_rows_at_once_equal_four_times_two(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    """The loss is the mean over the labelled tokens of the global batch, however it is split into micro-batches.

    One step over all 36 train rows, so both runs see the same rows; rows differ in length and in labelled tokens.
    """
    common = {"method": method, "train__effective_batch_size": 36, "train__max_steps": 2, "train__compute_dtype": "float32"}
    whole = trained(make_recipe, tmp_path / "whole", train__per_device_train_batch_size=36, **common)
    parts = trained(make_recipe, tmp_path / "parts", train__per_device_train_batch_size=4, **common)
    for one, two in zip(metrics(whole, "loss", "grad_norm"), metrics(parts, "loss", "grad_norm"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert metrics(whole, "tokens", "labelled_tokens") == metrics(parts, "tokens", "labelled_tokens")


@pytest.mark.parametrize("method", METHODS)
def test_tree_trains_as_padded_rows_do(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    common = {"method": method, "train__max_steps": 4, "train__compute_dtype": "float32", "train__learning_rate": 1e-3}
    tree = trained(make_recipe, tmp_path / "tree", **common)
    padded = trained(make_recipe, tmp_path / "padded", train__packing=False, **common)
    for one, two in zip(metrics(tree, "loss", "grad_norm"), metrics(padded, "loss", "grad_norm"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert metrics(tree, "tokens", "labelled_tokens") == metrics(padded, "tokens", "labelled_tokens")
    computed = [sum(count for (count,) in metrics(run, "computed_tokens")) for run in (tree, padded)]
    assert computed[0] < 0.7 * computed[1]


def test_architecture_without_proof_is_padded_and_told(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

    folder = tmp_path / "olmo"
    tokenizer = AutoTokenizer.from_pretrained(make_recipe().recipe.model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    OlmoForCausalLM(OlmoConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = trained(make_recipe, tmp_path / "run", model=str(folder), method="full", train__max_steps=1)
    assert [event["code"] for event in run.events("train") if event["code"] != "setting"] == ["packing-off"]


def test_loss_falls_and_only_the_adapter_is_saved(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = trained(make_recipe, tmp_path / "run", method="lora", train__max_steps=30, train__learning_rate=0.02)
    losses = [loss for (loss,) in metrics(run, "loss")]
    assert losses[-1] < losses[0] - 0.4
    assert all("lora_" in name for name in weights(run))
    summary = json.loads((run.path / "train" / "summary.json").read_text(encoding="utf-8"))
    assert summary["trainable_parameters"] == sum(value.numel() for value in weights(run).values())
    assert summary["steps"] == 30
    assert summary["peak_memory_bytes"] > 0


def test_metrics_have_one_line_for_each_step_and_tokens_add_up(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = trained(make_recipe, tmp_path / "run", method="full", train__max_steps=5, train__effective_batch_size=36)
    assert [step for (step,) in metrics(run, "step")] == [1, 2, 3, 4, 5]
    ledger = json.loads((run.path / "data" / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["rows_train"] == 36
    assert {tokens for (tokens,) in metrics(run, "tokens")} == {ledger["tokens_train"]}
    assert {count for (count,) in metrics(run, "labelled_tokens")} == {ledger["tokens_trained_on"]}
    lines = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert set(lines[0]) == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "computed_tokens",
        "labelled_tokens",
        "seconds",
    }


def test_learning_rate_warms_up_and_follows_the_cosine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = trained(make_recipe, tmp_path / "run", method="lora", train__max_steps=10, train__warmup_ratio=0.2)
    rates = [rate for (rate,) in metrics(run, "learning_rate")]
    assert rates[0] == 0.0
    assert rates[2] == max(rates) == pytest.approx(2e-4)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("optim", ["adamw", "adamw_kahan", "adamw_8bit"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_every_optimizer_learns_in_bf16(make_recipe: MakeRecipe, tmp_path: Path, optim: str, in_backward: bool) -> None:
    more = {"train__optim": optim, "train__optimizer_in_backward": in_backward, "train__compute_dtype": "bfloat16"}
    more |= {"train__max_steps": 20, "train__learning_rate": 2e-3, "train__max_grad_norm": 100.0}
    run = trained(make_recipe, tmp_path / "run", method="full", **more)
    losses = [loss for (loss,) in metrics(run, "loss")]
    assert losses[-1] < losses[0] - 0.4
    assert all(0 < norm < 100 for (norm,) in metrics(run, "grad_norm"))


#: Of the run that all changes are compared with; trained once.
PLAIN_LOSSES: list[list[float]] = []


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"train__optim": "adamw_kahan"}, 0.003),
        ({"train__optim": "adamw_8bit"}, 0.03),
        ({"train__gradient_checkpointing": True}, 1e-6),
        ({"train__gradient_checkpointing": "keep_attention"}, 1e-6),
        ({"train__attn_implementation": "eager"}, 0.003),
        ({"train__torch_compile": True}, 0.003),
    ],
)
def test_the_loss_follows_the_plain_run(
    make_recipe: MakeRecipe, tmp_path: Path, change: dict[str, Any], tolerance: float
) -> None:
    """20 steps in bf16 at a rate that lowers the loss by more than 0.4: never further apart than the tolerance."""
    common = {"method": "full", "train__compute_dtype": "bfloat16", "train__max_steps": 20, "train__learning_rate": 2e-3}
    if not PLAIN_LOSSES:
        PLAIN_LOSSES.extend(metrics(trained(make_recipe, tmp_path / "plain", **common), "loss"))
    other = trained(make_recipe, tmp_path / "other", **common, **change)
    pairs = list(zip(PLAIN_LOSSES, metrics(other, "loss"), strict=True))
    assert pairs[-1][0][0] < pairs[0][0][0] - 0.4
    assert max(abs(one - two) for (one,), (two,) in pairs) < tolerance


def test_compiling_is_asked_for_and_tells_where_it_cannot(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def no_compiler(_device: torch.device) -> None:
        asked.append(1)
        raise RuntimeError("torch.compile does not work here: no compiler")

    monkeypatch.setattr(kernels, "compiled", no_compiler)
    common = {"method": "lora", "train__max_steps": 2, "train__compute_dtype": "float32"}
    plain = trained(make_recipe, tmp_path / "plain", **common)
    assert asked == []
    run = trained(make_recipe, tmp_path / "run", **common, train__torch_compile=True)
    assert asked == [1]
    assert [e["message"] for e in run.events("train") if e["code"] == "compile-off"] == [
        "blocks are not compiled: torch.compile does not work here: no compiler"
    ]
    assert metrics(run, "loss") == metrics(plain, "loss")


@pytest.mark.parametrize("method", METHODS)
def test_without_kernels_of_ours_training_is_the_same_and_tells(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if cpu.unsupported_reason() is not None:
        pytest.skip(f"no custom kernels here: {cpu.unsupported_reason()}")
    common = {"method": method, "train__max_steps": 4, "train__compute_dtype": "float32"}
    own = trained(make_recipe, tmp_path / "own", **common)
    for module in cpu.KERNELS:
        monkeypatch.setattr(module, "unsupported_reason", lambda: "there is no C++ compiler (g++)")
        monkeypatch.setattr(module, "call", lambda *_: pytest.fail("a kernel was asked"))
    plain = trained(make_recipe, tmp_path / "plain", **common)
    told = [[e["message"] for e in run.events("train") if e["code"] == "kernels-off"] for run in (own, plain)]
    assert told == [[], ["PyTorch's kernels instead of tunesmith's faster ones: there is no C++ compiler (g++)"]]
    for (one,), (other,) in zip(metrics(own, "loss"), metrics(plain, "loss"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_attention_falls_back_and_tells(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    asked = {"train__attn_implementation": "flash_attention_3", "train__max_steps": 2, "train__compute_dtype": "float32"}
    run = trained(make_recipe, tmp_path / "flash", method="lora", **asked)
    events = [event for event in run.events("train") if event["code"] == "attention-fallback"]
    assert [event["message"].split(":")[0] for event in events] == [
        "attention flash_attention_3 is unavailable, falling back to flash_attention_2",
        "attention flash_attention_2 is unavailable, falling back to sdpa",
    ]
    assert "packing-off" in [event["code"] for event in run.events("train")]
    padded = trained(make_recipe, tmp_path / "padded", method="lora", **asked | {"train__attn_implementation": "sdpa"})
    assert metrics(run, "loss") == metrics(padded, "loss")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_noise_changes_the_losses_and_follows_the_seed(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    names = ("plain", "noisy", "again")
    alphas = {"plain": None, "noisy": 20.0, "again": 20.0}
    runs = {n: trained(make_recipe, tmp_path / n, method=method, train__neftune_noise_alpha=alphas[n]) for n in names}
    losses = {name: metrics(run, "loss") for name, run in runs.items()}
    assert losses["noisy"] == losses["again"] != losses["plain"]


def test_update_in_backward_refuses_accumulation(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    more = {"train__optimizer_in_backward": True, "train__gradient_accumulation_steps": 2}
    with pytest.raises(RecipeError, match="nothing to accumulate"):
        trained(make_recipe, tmp_path / "run", method="full", **more)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_not_finite_stops_before_the_optimizer(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    resolved = make_recipe(method=method)
    poisoned = Path(resolved.recipe.model).parent / "poisoned"
    if not poisoned.exists():
        import shutil

        shutil.copytree(resolved.recipe.model, poisoned)
        tensors = load_file(poisoned / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    run = create_run(make_recipe(method=method, model=str(poisoned)), tmp_path / "run")
    prepare(run)
    with pytest.raises(TrainError) as caught:
        train(run, QUIET)
    assert caught.value.problems[0].code == "TS301"
    assert metrics(run, "step") == []
    assert not (run.path / "train" / "checkpoints").exists()
    assert run.status()["stages"]["train"]["status"] == "failed"


def test_train_before_prepare_says_what_to_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = create_run(make_recipe(), tmp_path / "run")
    with pytest.raises(RunError, match="tunesmith prepare"):
        train(run, QUIET)


def test_second_run_does_nothing_and_a_change_redoes_its_stage(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    run = trained(make_recipe, path)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file() and "stage" not in p.name}
    prepare(run)
    train(run, QUIET)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("nothing is to be trained"))
    train_apart(run, QUIET)
    monkeypatch.undo()
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before
    changed = create_run(make_recipe(train__max_steps=5), path)
    prepare(changed)
    assert not is_trained(changed)
    assert (path / "data" / "train.arrow").stat().st_mtime_ns == before[path / "data" / "train.arrow"]
    assert train(changed, QUIET)["steps"] == 5
    made = (path / "data" / "train.arrow").read_bytes()
    (path / "data" / "train.arrow").unlink()
    prepare(changed)
    assert (path / "data" / "train.arrow").read_bytes() == made
    (path / "data" / "train.arrow").write_bytes(b"somebody's")
    with pytest.raises(RunError, match=r"TS015.*train.arrow"):
        prepare(changed)
    assert (path / "data" / "train.arrow").read_bytes() == b"somebody's"
