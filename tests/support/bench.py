"""Runs on a model of bytes, small enough to compare it whole with a reference."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunesmith.io.atomic import read_json
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

QUIET = Console(quiet=True)

Weights = dict[str, torch.Tensor]

Rows = list[dict[str, Any]]

#: Characters that make the rows distinct, so none counts as a copy of another.
LETTERS = ("k", "v", "z", "j", "w", "u", "y")

BASE = 9  # tokens of a row besides its letters: three marks, a question mark, an answer of four and its end

SEED = 5


@contextmanager
def little_work() -> Iterator[None]:
    """One thread, since kernels this small are faster on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte and a few marks: a vocabulary so small that comparing a whole model is fast."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    marks = ["<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=marks
    )
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return tokenizer


def byte_model(folder: Path) -> Path:
    """A random float32 model with biases; weight decay would change its biases and norms."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)  # so that predictions differ between tokens
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def seven_rows() -> Rows:
    """Row i has BASE + 2^i tokens, so a sum identifies its rows; the number of labelled tokens varies."""
    found = []
    for number, letter in enumerate(LETTERS):
        more = 2**number
        answered = more // 2 if number % 2 else 0
        found.append(chat(letter * (more - answered) + "?", "abcd" + "ef" * (answered // 2) + "g" * (answered % 2)))
    return found


@dataclass
class Bench:
    """Prepared runs, cached by their inputs; each training works on a copy."""

    folder: Path
    model: Path
    prepared: dict[str, Path] = field(default_factory=dict)

    def run(
        self, rows: Rows, method: str = "full", *, seed: int = SEED, heldout: float = 0, lora: str = "", **asked: Any
    ) -> Run:
        key = f"{len(rows)}-{seed}-{heldout}"
        file = self.folder / f"{len(rows)}.jsonl"
        if not file.exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        common = {"compute_dtype": "float32", "warmup_ratio": 0.0, "learning_rate": 0.01}
        text = f"model: {self.model}\nmethod: {method}\nseed: {seed}\ndata: {{train: {file}, heldout: {heldout}}}\n"
        text += f"train: {json.dumps(common | asked)}\n{lora}"
        resolved = parse_recipe(text, "recipe.yaml", self.folder)
        if key not in self.prepared:
            self.prepared[key] = self.folder / f"prepared-{key}"
            prepare(create_run(resolved, self.prepared[key]))
        path = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        shutil.copytree(self.prepared[key], path)
        return create_run(resolved, path)

    def trained(self, *args: Any, **asked: Any) -> Run:
        run = self.run(*args, **asked)
        train(run, QUIET)
        return run


def stored(run: Run, name: str = "train") -> Rows:
    return list(Dataset.from_file(str(run.path / "data" / f"{name}.arrow")))


def losses_of(model: torch.nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The negative log-likelihoods of each row's labels in nats; right-padded, so no token attends to padding."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[*row["input_ids"], *[0] * (longest - len(row["input_ids"]))] for row in rows])
    told = torch.tensor([[*row["loss_mask"], *[False] * (longest - len(row["loss_mask"]))] for row in rows])[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1].double()
    picked = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return [each[which] for each, which in zip(picked, told, strict=True)]


def mean_loss(model: torch.nn.Module, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The mean over the labels of all rows together."""
    return torch.cat(losses_of(model, rows)).mean()


def checkpoint(run: Run) -> Path:
    return Path(run.path / read_json(run.path / "train" / "summary.json")["checkpoint"])


def many_rows() -> Rows:
    """Rows with answers of very different lengths, so a mean over rows differs from one over labels."""
    draw = random.Random(3)
    rows = []
    for number in range(150):
        question = "".join(draw.choices("abcdefghij", k=6))
        rows.append(chat(question, "".join(draw.choices("klmnopqrst", k=1 if number % 3 else 20))))
    return rows
