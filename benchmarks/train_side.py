"""One side of train_speed.py: loads the model, then trains as many steps as each input line says.

Answers are lines of JSON: first `{"ready": true}`, then `seconds, losses, grad_norms, peak_memory_bytes` for each turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, set_seed
from turns import Turns, in_order

from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.packing.batch import StepCollator, collate_tree
from tunesmith.engine.packing.tree import Limits
from tunesmith.hardware import detect
from tunesmith.hardware.allocators import compact_loading, steady_memory
from tunesmith.hardware.memory import PeakMemory
from tunesmith.methods import make_method
from tunesmith.methods.settings import settle
from tunesmith.models import builtin
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.recipe import Recipe
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.losses import TokenLoss
from tunesmith.stages.train.recorder import Recorder

LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
PEERS = ("trl_padded", "trl_padding_free", "transformers")
_LONG = 100_000  # steps of the schedule; the caller ends the turns


def read_rows(folder: Path) -> Dataset:
    """The prepared rows."""
    return Dataset.from_file(str(folder / "train.arrow"))


def labelled(row: dict[str, Any]) -> dict[str, Any]:
    """The labels of a row: the token id where the loss mask is set, else -100."""
    pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
    return {"labels": [token if trained else -100 for token, trained in pairs]}


def peer_arguments(asked: argparse.Namespace, micro: int, steps: int) -> dict[str, Any]:
    """Arguments common to TRL's and transformers' trainers; bfloat16 means AMP, TRL's default."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": asked.rows // micro,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE[asked.method],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": asked.seed,
        "data_seed": asked.seed,
        "dataloader_pin_memory": False,
        "bf16": asked.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }


def peer(asked: argparse.Namespace, model: Any, rows: Dataset, micro: int, steps: int) -> Any:
    """TRL's trainer (its loss, padded or padding-free) or transformers' own (the model's loss by torch, padded)."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    arguments = peer_arguments(asked, micro, steps)
    tokenizer = load_tokenizer(builtin.ensure())
    if asked.side == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, data_collator=collator)
    config = SFTConfig(**arguments, max_length=None, padding_free=asked.side == "trl_padding_free")
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def peer_side(asked: argparse.Namespace) -> None:
    """A peer on the same ids and masks, with the same allocator settings; LoRA from the same initial adapter.

    With `--screen`, one step is timed for each size, on one model, and the process ends.
    """
    rows = read_rows(asked.data)
    rows = in_order(rows, rows["length"], asked.rows, asked.seed).map(labelled).select_columns(["input_ids", "labels"])
    steady_memory()
    meter = PeakMemory()
    with compact_loading():
        model = plain_model(asked, "bfloat16" if asked.dtype == "bfloat16" and asked.method != "full" else "float32")
    turns = Turns(meter)
    turns.answer(ready=True)
    if not asked.screen:
        trainer = peer(asked, model, rows, asked.micro, _LONG)
        trainer.add_callback(turns)
        trainer.train()
    for micro in asked.screen:
        trainer = peer(asked, model, rows, micro, 1)
        begun = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - begun
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        turns.answer(micro=micro, seconds=taken, losses=losses)


def defaults_side(asked: argparse.Namespace) -> None:
    """TRL's SFTTrainer with its defaults."""
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(asked.data).map(labelled).select_columns(["input_ids", "labels"])
    meter = PeakMemory()
    model = plain_model(asked, "float32")
    turns = Turns(meter)
    told = peer_arguments(asked, asked.micro, _LONG)
    config = SFTConfig(
        **{
            key: value
            for key, value in told.items()
            if key not in {"bf16", "gradient_checkpointing", "train_sampling_strategy"}
        },
        max_length=None,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=load_tokenizer(builtin.ensure()))
    trainer.add_callback(turns)
    turns.answer(ready=True)
    trainer.train()


def start_folder(asked: argparse.Namespace) -> Path:
    """The initial adapter of both sides, created by the first side that asks."""
    folder: Path = asked.scratch / f"adapter-{asked.r}"
    if not folder.is_dir():
        torch.manual_seed(asked.seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=asked.r, lora_alpha=2 * asked.r, target_modules="all-linear")
        get_peft_model(load_model(builtin.ensure(), dtype="float32"), config).save_pretrained(folder)
    return folder


def plain_model(asked: argparse.Namespace, dtype: str) -> Any:
    """The model as transformers and PEFT build it."""
    if asked.method == "full":
        return load_model(builtin.ensure(), dtype=dtype)
    if asked.method == "lora":
        base = load_model(builtin.ensure(), dtype=dtype)
    else:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, asked.dtype),
        )
        base = load_model(builtin.ensure(), dtype=dtype, quantization_config=four_bit)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return PeftModel.from_pretrained(base, start_folder(asked), is_trainable=True)


def our_side(asked: argparse.Namespace) -> None:
    """The engine as the train stage runs it."""
    rows = read_rows(asked.data)
    train = {
        "effective_batch_size": asked.rows,
        "max_steps": _LONG,
        "learning_rate": LEARNING_RATE[asked.method],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "compute_dtype": asked.dtype,
        **({} if asked.max_tokens is None else {"per_device_max_tokens": asked.max_tokens}),
    }
    values = {"model": builtin.NAME, "method": asked.method, "seed": asked.seed, "data": {"train": "rows"}, "train": train}
    recipe = Recipe.model_validate(values)
    steady_memory()
    meter = PeakMemory()
    settings = settle(recipe, len(rows), detect())
    method = make_method(recipe, builtin.ensure(), compute_dtype=asked.dtype, r=asked.r, lora_alpha=2 * asked.r)
    with compact_loading():
        model = method.build()
    if asked.method != "full":
        set_peft_model_state_dict(model, load_file(start_folder(asked) / "adapter_model.safetensors"))
    use_tree_attention(model, on=True)
    turns = Turns(meter)
    scratch = Path(tempfile.mkdtemp())
    limits = Limits(settings.per_device_max_tokens, settings.per_device_train_batch_size, settings.micro_batch_start)
    recorder = Recorder(scratch / "metrics.jsonl", settings.max_steps)
    engine = Engine(
        TokenLoss(),
        model,
        rows,
        StepCollator(collate_tree, limits),
        settings,
        recorder,
        scratch=scratch,
        tell=lambda code, text: print(code, text, file=sys.stderr),
    )
    recorder.on_step.append(lambda m, _: turns.note(m.loss, m.grad_norm, m.computed_tokens, m.labelled_tokens))
    engine.add_callback(turns)
    turns.answer(ready=True)
    engine.train()


def main() -> None:
    """Parse the arguments and train."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("side", choices=["tunesmith", *PEERS, "trl_defaults"])
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--method", choices=sorted(LEARNING_RATE), required=True)
    options.add_argument("--rows", type=int, required=True)
    options.add_argument("--micro", type=int, required=True)
    options.add_argument("--r", type=int, required=True)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    options.add_argument("--scratch", type=Path, required=True)
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--max-tokens", type=int, help="ours: tokens at once; default as settled")
    options.add_argument("--screen", type=int, nargs="*", default=[], help="peers: time a step with each micro-batch")
    asked = options.parse_args()
    set_seed(asked.seed)
    if asked.side == "tunesmith":
        our_side(asked)
    elif asked.side == "trl_defaults":
        defaults_side(asked)
    else:
        peer_side(asked)


if __name__ == "__main__":
    main()
