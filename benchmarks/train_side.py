"""One side of train_speed.py: loads the model, then trains as many steps as each line of its input says.

Answers are lines of JSON: first `{"ready": true}`, then for each turn `seconds, losses, grad_norms, peak_memory_bytes`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from tunesmith.hardware.memory import PeakMemory
from tunesmith.methods import make_method
from tunesmith.models import builtin
from tunesmith.recipe import Recipe

LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
_LONG = 100_000  # steps that the schedule is made for; turns end by being told so


class Turns(TrainerCallback):
    """Waits before each turn for a line with the number of its steps, and answers what they took."""

    def __init__(self, meter: PeakMemory) -> None:
        self.meter = meter
        self.left = 0
        self.begun = 0.0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries may print; answers go where nothing else does

    def answer(self, **values: Any) -> None:
        """Write one line."""
        print(json.dumps(values), file=self.answers, flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Collect the losses of the turn."""
        if logs is not None and "grad_norm" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait where the turn is over. What comes between two steps, as collating, counts for the turn."""
        if self.left == 0:
            if self.begun:
                seconds = time.perf_counter() - self.begun
                peak = self.meter.peak_bytes()
                self.answer(seconds=seconds, losses=self.losses, grad_norms=self.norms, peak_memory_bytes=peak)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            self.left = int(line)
            self.losses, self.norms = [], []
            if not self.begun:
                self.meter.reset()
            self.begun = time.perf_counter()
        self.left -= 1


def read_rows(folder: Path) -> Dataset:
    """The prepared rows."""
    return Dataset.from_file(str(folder / "train.arrow"))


def trl_side(asked: argparse.Namespace, *, tuned: bool, padding_free: bool) -> None:
    """TRL's SFTTrainer on the same ids and masks; LoRA from the same start."""
    from trl import SFTConfig, SFTTrainer

    def with_labels(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["trained"], strict=True)
        return {"labels": [token if trained else -100 for token, trained in pairs]}

    rows = read_rows(asked.data).map(with_labels).select_columns(["input_ids", "labels"])
    meter = PeakMemory()
    model = plain_model(asked, "float32")
    turns = Turns(meter)
    own: dict[str, Any] = {"bf16": asked.dtype == "bfloat16", "gradient_checkpointing": False, "padding_free": padding_free}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=asked.micro,
        gradient_accumulation_steps=asked.rows // asked.micro,
        max_steps=_LONG,
        learning_rate=LEARNING_RATE[asked.method],
        lr_scheduler_type="constant",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=asked.seed,
        data_seed=asked.seed,
        dataloader_pin_memory=False,
        **(own if tuned else {}),
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer())
    trainer.add_callback(turns)
    turns.answer(ready=True)
    trainer.train()


def tokenizer() -> Any:
    """The built-in model's."""
    from tunesmith.models.load import load_tokenizer

    return load_tokenizer(builtin.ensure())


def start_folder(asked: argparse.Namespace) -> Path:
    """The adapter that both sides begin with, made by the first one that asks."""
    folder: Path = asked.scratch / f"adapter-{asked.r}"
    if not folder.is_dir():
        from peft import LoraConfig, get_peft_model

        from tunesmith.models.load import load_model

        torch.manual_seed(asked.seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=asked.r, lora_alpha=2 * asked.r, target_modules="all-linear")
        get_peft_model(load_model(builtin.ensure(), dtype="float32"), config).save_pretrained(folder)
    return folder


def plain_model(asked: argparse.Namespace, dtype: str) -> Any:
    """The model as transformers and PEFT make it."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from tunesmith.models.load import load_model

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


def our_side(asked):
    pass


def main() -> None:
    """Parse and train."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("side", choices=["tunesmith", "trl", "trl_padded", "trl_defaults"])
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--method", choices=sorted(LEARNING_RATE), required=True)
    options.add_argument("--rows", type=int, required=True)
    options.add_argument("--micro", type=int, required=True)
    options.add_argument("--r", type=int, required=True)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    options.add_argument("--scratch", type=Path, required=True)
    options.add_argument("--seed", type=int, default=42)
    asked = options.parse_args()
    set_seed(asked.seed)
    if asked.side == "tunesmith":
        our_side(asked)
    else:
        trl_side(asked, tuned=asked.side != "trl_defaults", padding_free=asked.side == "trl")


if __name__ == "__main__":
    main()
