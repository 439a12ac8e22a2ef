"""One side of dpo_speed.py: for each input line `MICRO RUN`, trains on the pairs of a prepared run with that micro-batch.

Answers are lines of JSON: `seconds` (reference and all steps), `losses`, `margins` (of rewards), `peak_memory_bytes`. Imports,
model loading and trainer construction are excluded from the timing. Both sides have the same allocator settings; our side
chooses its micro-batches itself.
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

from datasets import Dataset
from rich.console import Console
from transformers import set_seed
from turns import in_order

from tunesmith.hardware.allocators import steady_memory
from tunesmith.hardware.memory import PeakMemory
from tunesmith.methods import make_method
from tunesmith.models.load import load_model, load_tokenizer, locate
from tunesmith.runs import Run, open_run, read_jsonl
from tunesmith.stages.train import train

Answer = dict[str, Any]


def our_side(run: Run) -> Answer:
    """The train stage itself."""
    summary = train(run, Console(quiet=True))
    lines = read_jsonl(run.path / "train" / "metrics.jsonl")
    return {
        "seconds": summary["seconds"],
        "seconds_before_first_step": summary["seconds_before_first_step"],
        "losses": [line["loss"] for line in lines],
        "margins": [line["reward_margin"] for line in lines],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def trl_side(run: Run, micro: int, *, precompute: bool) -> Answer:
    """TRL's DPOTrainer on the same ids, from the same adapter; its reference is the adapter turned off, or precomputed."""
    from trl import DPOTrainer

    class Prepared(DPOTrainer):
        """Rows are already token ids; the time of precomputing the reference counts as training time."""

        before = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            begun = time.perf_counter()
            made = super()._precompute_ref_logps(*args)
            self.before += time.perf_counter() - begun
            return made

    model = plain_model(run)
    rows = pairs_in_order(run)
    tokenizer = load_tokenizer(locate(run.recipe.model, None))
    meter = PeakMemory()
    meter.reset()
    set_seed(run.recipe.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Prepared(
            model=model,
            args=arguments(run, micro, scratch, precompute=precompute),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = trainer.before + time.perf_counter() - begun
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "seconds": seconds,
        "seconds_before_first_step": trainer.before,
        "losses": [line["loss"] for line in lines],
        "margins": [line["rewards/margins"] for line in lines],
        "peak_memory_bytes": meter.peak_bytes(),
    }


def arguments(run: Run, micro: int, scratch: str, *, precompute: bool) -> Any:
    """TRL's arguments without checkpointing, in the recipe's dtype; bfloat16 means AMP, TRL's default."""
    from trl import DPOConfig

    asked = run.recipe.train
    return DPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=int(asked.effective_batch_size) // micro,
        max_steps=asked.max_steps or -1,
        learning_rate=float(asked.learning_rate),
        lr_scheduler_type="constant",
        weight_decay=0.0,
        beta=run.recipe.dpo.beta,
        max_length=None,
        precompute_ref_log_probs=precompute,
        bf16=asked.compute_dtype == "bfloat16",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=run.recipe.seed,
        data_seed=run.recipe.seed,
        dataloader_pin_memory=False,
    )


def pairs_in_order(run: Run) -> Dataset:
    """The pairs in TRL's columns, in the engine's order, sorted by length within a step."""
    rows = Dataset.from_file(str(run.path / "data" / "train.arrow"))
    lengths = [max(len(row["input_ids"]), len(row["rejected_input_ids"])) for row in rows]
    drawn = in_order(rows, lengths, int(run.recipe.train.effective_batch_size), run.recipe.seed)
    return Dataset.from_list([cut(row) for row in drawn])


def cut(row: dict[str, Any]) -> dict[str, Any]:
    """A pair in TRL's columns, without the template's text after the answers: neither side has it in its loss."""
    names = {"prompt_ids": row["input_ids"][: row["loss_mask"].index(True)]}
    for name, prefix in (("chosen_ids", ""), ("rejected_ids", "rejected_")):
        flags = zip(row[f"{prefix}input_ids"], row[f"{prefix}loss_mask"], strict=True)
        names[name] = [token for token, trained in flags if trained]
    return names


def plain_model(run: Run) -> Any:
    """The model as transformers and PEFT build it, with our side's initial adapter (drawn from the same seed)."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    folder, lora = locate(run.recipe.model, None), run.recipe.lora
    start = make_method(run.recipe, folder, compute_dtype="float32", r=int(lora.r), lora_alpha=int(lora.lora_alpha)).build()
    drawn = {name.replace(".default", ""): value for name, value in start.state_dict().items() if "lora_" in name}
    config = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear")
    made = get_peft_model(load_model(folder, dtype=str(run.recipe.train.compute_dtype)), config)
    set_peft_model_state_dict(made, drawn)
    return made


def main() -> None:
    """Answer until the input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("side", choices=["tunesmith", "trl", "trl_precomputed"])
    asked = options.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to the original stdout
    steady_memory()
    for line in sys.stdin:
        micro, _, path = line.strip().partition(" ")
        run = open_run(Path(path))
        ours = asked.side == "tunesmith"
        answer = our_side(run) if ours else trl_side(run, int(micro), precompute=asked.side == "trl_precomputed")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
