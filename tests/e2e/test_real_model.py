"""One pass of the real 135M model through the whole demo task, small: LoRA learns the answer format."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tunesmith import demo
from tunesmith.inference.generate import generate
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.recipe import load_recipe
from tunesmith.runs import create_run
from tunesmith.stages.evaluate import evaluate
from tunesmith.stages.evaluate.stage import evaluate_base
from tunesmith.stages.export import export
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

QUIET = Console(quiet=True)


@pytest.mark.real_model
def test_the_built_in_model_knows_a_capital(real_model: Path) -> None:
    tokenizer, model = load_tokenizer(real_model), load_model(real_model, dtype="float32")
    prompt = tokenizer("The capital of France is")["input_ids"]
    (answer,) = generate(model, [prompt], stop_ids=[tokenizer.eos_token_id], max_new_tokens=2, batch_size=1)
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
@pytest.mark.real_model
def test_lora_learns_the_demo_task(tmp_path: Path, real_model: Path) -> None:
    recipe = demo.write_input(tmp_path / "input", train_rows=120, test_rows=8, max_rows=80)
    # A higher rate than the default, since this run has only ten steps.
    overrides = ["method=lora", "train.learning_rate=0.001", "data.heldout=0.1", "evaluate.max_new_tokens=48"]
    run = create_run(load_recipe(recipe, overrides), tmp_path / "run")
    ledger = prepare(run)
    assert ledger["rows_in"] == ledger["rows_train"] + ledger["rows_heldout"] + ledger["rows_unused"] + ledger["rows_rejected"]
    summary = train(run, QUIET)
    assert summary["last_loss"] < 0.5 * summary["first_loss"]
    proof = export(run)
    assert proof["mean_kl"] < 1e-3
    base, tuned = evaluate_base(run, QUIET), evaluate(run, console=QUIET)
    assert base["json_parse_rate"] < 0.3
    assert tuned["json_parse_rate"] > 0.8
    assert tuned["task_score"] > base["task_score"] + 0.2
    assert tuned["eval_loss"] < 0.5 * base["eval_loss"]
