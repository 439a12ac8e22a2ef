"""LLaMA-Factory's side of train_speed.py: its own trainer on the prepared ids and masks, in its own environment.

It answers as train_side.py does, and imports only the memory meter from tunesmith.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from turns import Turns, in_order

from tunesmith.hardware.memory import PeakMemory

_LONG = 100_000  # steps of the schedule; the caller ends the turns


def save_rows(data: Path, target: Path, batch: int, seed: int) -> None:
    """Save the prepared rows in LLaMA-Factory's tokenized format, in the engine's order, sorted by length within a step."""

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        return {
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": [token if trained else -100 for token, trained in pairs],
        }

    rows = Dataset.from_file(str(data / "train.arrow"))
    rows = in_order(rows, rows["length"], batch, seed).map(columns)
    DatasetDict({"train": rows.select_columns(["input_ids", "attention_mask", "labels"])}).save_to_disk(str(target))


def settings(asked: argparse.Namespace, tokenized: Path) -> dict[str, Any]:
    """Its config: no checkpointing, the same adapter, batch, rows and learning rate."""
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(asked.model),
        "template": "chatml",
        "dataset": "unused",
        "tokenized_path": str(tokenized),
        "finetuning_type": asked.method,
        "lora_target": "all",
        "lora_rank": asked.r,
        "lora_alpha": 2 * asked.r,
        "lora_dropout": 0.0,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "bf16": asked.dtype == "bfloat16",
        "per_device_train_batch_size": asked.micro,
        "gradient_accumulation_steps": asked.rows // asked.micro,
        "max_steps": _LONG,
        "learning_rate": 2e-4 if asked.method == "lora" else 2e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": asked.seed,
        "dataloader_pin_memory": False,
        "overwrite_output_dir": True,
        "output_dir": str(asked.scratch / "llamafactory"),
    }


def main() -> None:
    """Parse the arguments and train."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("side", choices=["llamafactory"])
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--method", choices=["full", "lora"], required=True)
    options.add_argument("--rows", type=int, required=True)
    options.add_argument("--micro", type=int, required=True)
    options.add_argument("--r", type=int, required=True)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    options.add_argument("--scratch", type=Path, required=True)
    options.add_argument("--seed", type=int, default=42)
    asked = options.parse_args()
    turns = Turns(PeakMemory())
    from llamafactory.train.tuner import run_exp

    tokenized = asked.scratch / "tokenized"
    save_rows(asked.data, tokenized, asked.rows, asked.seed)
    turns.answer(ready=True)
    run_exp(args=settings(asked, tokenized), callbacks=[turns])


if __name__ == "__main__":
    main()
