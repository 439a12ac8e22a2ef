"""Exports compute the same as the trained model; if they would not, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.errors import ExportError
from tunesmith.runs import create_run
from tunesmith.stages.export import export
from tunesmith.stages.export.stage import trained_method
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

QUIET = Console(quiet=True)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_equals_trained(make_recipe: Any, tmp_path: Path, method: str, dtype: str) -> None:
    settings = {"train__max_steps": 20, "train__learning_rate": 0.01, "train__compute_dtype": dtype}
    run = create_run(make_recipe(method=method, **settings), tmp_path / "run")
    prepare(run)
    train(run, QUIET)
    proof = export(run)
    assert proof["mean_kl"] < 1e-3
    assert proof["tokens"] > 0
    folder = run.path / "export" / "merged"
    # Before rounding, the merged float32 model equals the trained one to the last digits; this is the stricter check.
    trained, checkpoint = trained_method(run)
    model = trained.load_trained(checkpoint).eval()
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = trained.merge(model).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tensors = load_file(folder / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in tensors)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(folder).chat_template == (run.path / "data" / "chat_template.jinja").read_text()


def test_trained_end_of_turn_becomes_a_stop_token(make_recipe: Any, tmp_path: Path) -> None:
    """A template that ends turns with a token other than the model's eos: generation must stop there."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|endoftext|>{% endfor %}", encoding="utf-8")
    run = create_run(make_recipe(data__chat_template=str(template)), tmp_path / "run")
    prepare(run)
    train(run, QUIET)
    proof = export(run)
    assert proof["stop_tokens_added"] == [0]
    assert AutoModelForCausalLM.from_pretrained(run.path / "export" / "merged").generation_config.eos_token_id == [2, 0]


def test_an_export_that_differs_is_refused(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that drops the adapter, as rounding to nearest does in part, must fail the proof."""
    run = create_run(make_recipe(method="lora", train__max_steps=20, train__learning_rate=0.02), tmp_path / "run")
    prepare(run)
    train(run, QUIET)
    monkeypatch.setattr("tunesmith.methods.lora.Lora.merge", lambda _, model: model.unload())
    with pytest.raises(ExportError) as caught:
        export(run)
    assert caught.value.problems[0].code == "TS401"
    assert list((run.path / "export").iterdir()) == []
