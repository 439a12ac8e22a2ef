"""Continued pre-training through the real command line: raw text, its export, and SFT from it; loss equal to transformers'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.conftest import chat_row
from tests.support.commands import Inside, check_readable, write
from tests.support.prepared import read_arrow
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import PaddedCollator, StepCollator, collate_tree
from tunesmith.engine.packing.tree import Limits

WORDS = ("the", "river", "runs", "slowly", "past", "an", "old", "mill", "and", "its", "wheel", "turns", "once", "more")
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(10 + 9 * (i % 9))) + f" {i}." for i in range(24)]


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model without a chat template, like base models."""
    folder = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def recipe_text(model: Path, data: str, more: str = "") -> str:
    return f"""\
model: {model}
objective: pretrain
data: {{{data}, heldout: 0.2, max_length: 32}}
train: {{max_steps: 3, effective_batch_size: 8, compute_dtype: float32, learning_rate: 0.001}}
{more}"""


def test_pretrain_then_sft(tmp_path: Path, base: Path, inside: Inside) -> None:
    write(tmp_path / "texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = write(tmp_path / "r.yaml", recipe_text(base, "train: texts.jsonl"))
    done = inside("run", recipe, "--run", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out"
    ledger = json.loads((run / "data" / "ledger.json").read_text(encoding="utf-8"))
    train, heldout = (read_arrow(run / "data" / f"{name}.arrow") for name in ("train", "heldout"))
    assert ledger["rows_in"] == 24 == ledger["rows_train"] + ledger["rows_heldout"]
    assert ledger["pieces"] == {"train": len(train), "heldout": len(heldout)}
    assert len(train) > ledger["rows_train"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    told = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)  # each has one eos more, and an unlabelled first token
    assert sum(sum(row["loss_mask"]) for row in [*train, *heldout]) == told
    origins = [{row["where"].partition(" (")[0] for row in rows} for rows in (train, heldout)]
    assert not origins[0] & origins[1]  # no document is in both
    assert not (run / "data" / "chat_template.jinja").exists()
    (results,) = (json.loads(p.read_text(encoding="utf-8")) for p in run.glob("eval/*/task/results.json"))
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=2e-2)
    assert 0 <= results["task_score"] <= 1

    write(tmp_path / "chat.jsonl", "".join(json.dumps(chat_row(f"{i}?", f"a{i}")) + "\n" for i in range(12)))
    write(tmp_path / "t.jinja", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    second = f"model: {run}/export/merged\ndata: {{train: chat.jsonl, chat_template: t.jinja}}\ntrain: {{max_steps: 1}}\n"
    sft = write(tmp_path / "sft.yaml", second)
    for arguments in (("prepare", sft, "--run", "sft"), ("train", "sft")):
        done = inside(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_keys_of_conversations_are_refused(tmp_path: Path, base: Path, inside: Inside) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "one two")
    recipe = write(tmp_path / "r.yaml", recipe_text(base, "train: texts, system: Hi", "evaluate: {label: x}\n"))
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    check_readable(done, "TS005", "data.system")
    check_readable(done, "TS005", "evaluate.label")


@pytest.mark.parametrize("packing", [True, False])
def test_loss_is_that_of_transformers_over_padded_documents(tiny_model: Path, tokenizer: Any, packing: bool) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS[:8]]
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    logits = model(input_ids=padded, attention_mask=mask).logits[:, :-1].flatten(0, 1).detach()
    labels = padded.masked_fill(mask == 0, -100)[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels)  # transformers' own loss is float32, which is too coarse
    rows = [{"input_ids": row, "loss_mask": [False] + [True] * (len(row) - 1)} for row in ids]
    use_tree_attention(model, on=packing)
    collate = collate_tree if packing else PaddedCollator(0)
    batches = StepCollator(collate, Limits(tokens=100))(rows)["micro_batches"]
    assert len(batches) > 1
    total = sum(float(summed_loss(model, batch).detach()) for batch in batches)
    assert total / (sum(map(len, ids)) - len(ids)) == pytest.approx(float(expected), abs=1e-10)
