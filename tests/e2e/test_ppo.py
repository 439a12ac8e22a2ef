"""PPO through the stages: the reward rises, the first update starts from equal probabilities, files match other objectives'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.pairs import PAIRS
from tests.support.policy import REWARD, share_towards_reward
from tunesmith.errors import TrainError
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.pipeline import train_apart
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.export import export
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train
from tunesmith.stages.train.loops.ppo import Policy


def run_of(tmp_path: Path, model: Path, method: str, ppo: str, train_more: str = "") -> Run:
    rows = "".join(json.dumps({"prompt": pair["prompt"]}) + "\n" for pair in PAIRS)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    text = f"""\
model: {model}
method: {method}
objective: ppo
data: {{train: rows.jsonl, heldout: 0.1, max_length: 256}}
train:
  {{effective_batch_size: 16, per_device_train_batch_size: 16, compute_dtype: float32, warmup_ratio: 0{train_more}}}
ppo: {{{ppo}}}
"""
    run = create_run(parse_recipe(text, "r.yaml", tmp_path), tmp_path / "run")
    prepare(run)
    return run


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 1e-2)])
def test_a_step_goes_towards_what_was_rewarded(
    method: str, rate: float, tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    asked = "reward_funcs: ['mine.py:short'], max_completion_length: 1, num_ppo_epochs: 2, kl_coef: 0.0"
    run = run_of(tmp_path, tiny_model, method, asked, f", learning_rate: {rate}, lr_scheduler_type: constant, max_steps: 1")
    summary = train(run, Console(quiet=True))
    (line,) = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert summary["steps"] == 1
    assert abs(line["kl"]) < 1e-4  # no weight has changed when the answers are sampled
    assert export(run)["mean_kl"] < 0.01
    assert share_towards_reward(run, tiny_model, tmp_path / "mine.py.jsonl", tokenizer, grouped=False) > 0.5


def test_values_and_probabilities_do_not_depend_on_the_padding(tiny_model: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_model), load_model(tiny_model, dtype="float32").eval()
    policy = Policy(model, temperature=0.7)
    torch.nn.init.normal_(policy.value_head.weight)
    prompts = [tokenizer("Which colour is it?")["input_ids"], tokenizer("Why")["input_ids"]]
    answers = [tokenizer("red")["input_ids"], tokenizer("because of the rain today")["input_ids"]]
    with torch.no_grad():
        logprobs, values = policy(prompts, answers, 12)
        for number in range(2):
            alone = policy(prompts[number : number + 1], answers[number : number + 1], 12)
            torch.testing.assert_close(logprobs[number : number + 1], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[number : number + 1], alone[1], atol=1e-5, rtol=1e-5)
        whole = torch.tensor([prompts[1] + answers[1]])
        expected = (model(whole).logits[0].float() / 0.7).log_softmax(-1)
    start = len(prompts[1])
    direct = [float(expected[start - 1 + place, token]) for place, token in enumerate(answers[1])]
    assert logprobs[1, : len(direct)].tolist() == pytest.approx(direct, abs=1e-4)
    assert not logprobs[1, len(direct) :].any()


def test_json_rewards_without_references_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    run = run_of(tmp_path, tiny_model, "lora", "reward_funcs: [json-fields]", ", max_steps: 1")
    with pytest.raises(TrainError, match="no JSON object"):  # in a separate process too
        train_apart(run, Console(quiet=True))
    with pytest.raises(TrainError, match="no JSON object"):
        train(run, Console(quiet=True))
