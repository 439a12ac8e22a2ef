"""Turns a recipe's settings into transformers' arguments and our optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tunesmith.engine.optim.adamw import AdamW, store_of
from tunesmith.methods.settings import Settings


def common_arguments(settings: Settings, scratch: Path, *, cpu: bool) -> dict[str, Any]:
    """The arguments of every `Trainer` except for its batches; it leaves saving, logging and reporting to us."""
    return {
        "output_dir": str(scratch),
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not cpu,
        "use_cpu": cpu,
    }


def training_arguments(settings: Settings, scratch: Path, *, cpu: bool) -> TrainingArguments:
    """The engine's arguments."""
    arguments = TrainingArguments(
        **common_arguments(settings, scratch, cpu=cpu),
        # A `Trainer` batch holds all rows of an optimizer step; the collator splits them into micro-batches.
        per_device_train_batch_size=settings.effective_batch_size,
        gradient_accumulation_steps=1,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    # With several GPUs in one process Trainer would wrap the model in DataParallel, which cannot split a tree.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_adamw(trainer: Any, model: Any, settings: Settings) -> AdamW:
    """The optimizer of a `Trainer`'s model in the format the settings name; weight decay on matrices only."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(model)) & trained.keys()
    groups = [
        {"params": [trained[name] for name in trained if name in decayed], "weight_decay": trainer.args.weight_decay},
        {"params": [trained[name] for name in trained if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    store = store_of(offloading=settings.optimizer_offloading)
    return AdamW.named(settings.optim, groups, lr=trainer.args.learning_rate, seed=trainer.args.seed, store=store)
