"""KTO, ORPO, reward models, GRPO and RLOO through the stages, on the tiny model, compared with TRL's own trainers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from tests.conftest import chat_row
from tests.support.pairs import PAIRS
from tests.support.policy import REWARD, share_towards_reward
from tunesmith.chat.template import ChatTemplate
from tunesmith.errors import DataError, EvaluateError, ExportError, PlanError, RunError, TunesmithError
from tunesmith.inference.rewards import rewards_of
from tunesmith.models.load import load_model, load_reward_model, load_tokenizer
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.evaluate.stage import evaluate
from tunesmith.stages.export import export
from tunesmith.stages.plan.stage import plan
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train
from tunesmith.stages.train.loops.rewards import make_reward

pytest.importorskip("trl", reason="the extra tunesmith[trl] is not installed")

JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
    for number, pair in enumerate(PAIRS)
]
ASKED = [{"prompt": pair["prompt"], "answer": json.dumps({"colour": pair["chosen"]})} for pair in PAIRS]
QUIET = Console(quiet=True)


@pytest.fixture
def made(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    """A prepared run over rows; `more` is YAML with further sections."""

    def make(objective: str, rows: list[dict[str, Any]], more: str = "", train_more: str = "", method: str = "full") -> Run:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = f"""\
model: {tiny_model}
method: {method}
objective: {objective}
data: {{train: {path}, heldout: 0.1, max_length: 256}}
train: {{max_steps: 2, effective_batch_size: 8, compute_dtype: float32, warmup_ratio: 0{train_more}}}
evaluate: {{task: text, max_new_tokens: 4, max_rows: 2}}
{more}
"""
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / f"run-{objective}-{method}")
        prepare(run)
        return run

    return make


def metrics(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(run.path / "train" / "metrics.jsonl")


def own_rows(run: Run, objective: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The prepared rows as plain text for TRL: the rendered prompt, and answers without their end of turn."""
    raw = {f"rows.jsonl:{number}": row for number, row in enumerate(JUDGED if objective == "kto" else PAIRS, start=1)}
    template = ChatTemplate(tokenizer)
    found = []
    for row in Dataset.from_file(str(run.path / "data" / "train.arrow")):
        source = dict(raw[Path(row["where"].rpartition(":")[0]).name + ":" + row["where"].rpartition(":")[2]])
        prompt = template.render([{"role": "user", "content": source["prompt"]}], add_generation_prompt=True)
        found.append(source | {"prompt": prompt})
    return found


def trl_loss(kind: str, rows: list[dict[str, Any]], model_folder: Path, scratch: Path) -> float:
    """The loss of the first step of TRL's own trainer with its own tokenizing, optimizer and collator."""
    from trl import KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    data = Dataset.from_list(rows)
    common: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": 42,
        "data_seed": 42,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder, dtype="float32")
    if kind == "kto":
        config = KTOConfig(**common, beta=0.3, desirable_weight=1.5, max_length=None)
        trainer = KTOTrainer(model, args=config, train_dataset=data.shuffle(seed=42), processing_class=tokenizer)
    else:
        config = ORPOConfig(**common, beta=0.3, max_length=256, remove_unused_columns=False)
        trainer = ORPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


@pytest.mark.parametrize(
    ("objective", "section"),
    [("kto", "kto: {beta: 0.3, desirable_weight: 1.5}"), ("orpo", "orpo: {beta: 0.3}")],
)
def test_the_first_loss_is_that_of_trls_own_trainer(
    objective: str, section: str, made: Callable[..., Run], tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run = made(objective, JUDGED if objective == "kto" else PAIRS, section)
    train(run, QUIET)
    expected = trl_loss(objective, own_rows(run, objective, tokenizer), tiny_model, tmp_path / "scratch")
    lines = metrics(run)
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["labelled_tokens"] < line["tokens"] <= line["computed_tokens"] for line in lines)
    proof = export(run)
    assert proof["mean_kl"] < 0.01
    assert evaluate(run, console=QUIET)["eval_loss"] > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_trained_without_trls_reference_copy(method: str, made: Callable[..., Run], tiny_model: Path) -> None:
    run = made("kto", JUDGED, method=method, train_more=", learning_rate: 1.0e-3")
    summary = train(run, QUIET)
    checkpoint = run.path / summary["checkpoint"]
    assert not (checkpoint / "ref").exists()
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any(float(weight.abs().max()) > 0 for name, weight in weights.items() if "lora_B" in name)
    assert summary["trainable_parameters"] == sum(weight.numel() for weight in weights.values())
    assert export(run)["mean_kl"] < 0.01


@pytest.mark.parametrize(("method", "dtype"), [("full", "float32"), ("lora", "bfloat16")])
def test_a_reward_model_ranks_pairs_and_serves_as_a_reward(method: str, dtype: str, made: Callable[..., Run]) -> None:
    rate = 3e-3 if method == "full" else 1e-2
    run = made("reward", PAIRS, train_more=f", learning_rate: {rate}", method=method)
    run = Run(run.path, longer(run.recipe, 12))
    recipe = run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update={"compute_dtype": dtype})})
    run = Run(run.path, recipe)
    train(run, QUIET)
    proof = export(run)
    assert proof["max_reward_difference"] < 1e-4
    assert proof["reward_accuracy"] >= 0.9
    with pytest.raises(EvaluateError, match="reward model"):
        evaluate(run, console=QUIET)
    folder = run.path / "export" / "merged"
    reward = make_reward(str(folder))
    prompts = [[{"role": "user", "content": pair["prompt"]}] for pair in PAIRS[:4]]
    good, bad = (reward(prompts, [pair[side] for pair in PAIRS[:4]], [None] * 4) for side in ("chosen", "rejected"))
    assert sum(g > b for g, b in zip(good, bad, strict=True)) >= 3
    row = Dataset.from_file(str(run.path / "data" / "heldout.arrow"))[0]
    assert rewards_of(load_reward_model(folder, dtype="float32"), [row["input_ids"]]) != rewards_of(
        load_reward_model(folder, dtype="float32"), [row["rejected_input_ids"]]
    )


def longer(recipe: Any, steps: int, batch: int = 8) -> Any:
    more = {"max_steps": steps, "effective_batch_size": batch, "per_device_train_batch_size": batch}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=more)})


def test_a_reward_model_of_qlora_is_trained_and_its_merge_refused(made: Callable[..., Run]) -> None:
    run = made("reward", PAIRS, method="qlora")
    checkpoint = run.path / train(run, QUIET)["checkpoint"]
    from safetensors.torch import load_file

    assert any("score" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    with pytest.raises(ExportError, match="TS402"):
        export(run)


@pytest.mark.parametrize(
    ("objective", "method", "rate"), [("grpo", "lora", 1e-2), ("grpo", "full", 1e-3), ("rloo", "lora", 1e-2)]
)
def test_a_step_goes_towards_what_was_rewarded(
    objective: str, method: str, rate: float, made: Callable[..., Run], tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    asked = "reward_funcs: ['mine.py:short'], num_generations: 8, max_completion_length: 1, beta: 0.0"
    more = f", learning_rate: {rate}, lr_scheduler_type: constant"
    run = made(objective, ASKED, f"{objective}: {{{asked}}}", more, method)
    run = Run(run.path, longer(run.recipe, 1, 32))
    train(run, QUIET)
    assert export(run)["mean_kl"] < 0.01
    assert share_towards_reward(run, tiny_model, tmp_path / "mine.py.jsonl", tokenizer, grouped=True) > 0.5


def test_plans_are_refused(made: Callable[..., Run]) -> None:
    run = made("kto", JUDGED)
    with pytest.raises(PlanError, match="TS705"):
        plan(run)


def test_rows_of_another_objective_are_refused(made: Callable[..., Run]) -> None:
    for objective, rows in (("kto", PAIRS), ("orpo", JUDGED), ("grpo", PAIRS), ("kto", [chat_row("a?", "b")])):
        with pytest.raises(TunesmithError, match="TS113"):
            made(objective, rows, "grpo: {reward_funcs: [valid-json]}" if objective == "grpo" else "")


def test_the_ledger_of_judged_rows_and_prompts(made: Callable[..., Run]) -> None:
    for objective, rows in (("kto", JUDGED), ("grpo", ASKED)):
        run = made(objective, [*rows, rows[0]], "grpo: {reward_funcs: [json-fields]}" if objective == "grpo" else "")
        ledger = json.loads((run.path / "data" / "ledger.json").read_text(encoding="utf-8"))
        assert (ledger["rows_in"], ledger["rows_train"], ledger["rows_heldout"]) == (41, 36, 4)
        assert ledger["reasons"] == {"duplicate": 1}
        assert (ledger["tokens_trained_on"] > 0) == (objective == "kto")
    row = Dataset.from_file(str(run.path / "data" / "train.arrow"))[0]
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    assert json.loads(row["reference"])["colour"]


def test_prepared_rows_are_not_taken_for_another_objectives(made: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("kto", JUDGED)
    others = [Run(run.path, run.recipe.model_copy(update={"objective": objective})) for objective in ("sft", "orpo", "grpo")]
    for other in others:
        with pytest.raises(RunError, match="TS012"):
            train(other, QUIET)
    monkeypatch.setattr(Run, "outdated", lambda *_: None)  # as if the files in data/ had been replaced
    for other in others:
        with pytest.raises(DataError, match="TS113"):
            train(other, QUIET)
