"""Reward models with the three methods: the same base and adapter, and a fully trained scalar head.

PEFT keeps the head in the adapter's own folder (`modules_to_save`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.methods.base import Method
from tunesmith.methods.lora import adapter_config
from tunesmith.methods.qlora import QLora
from tunesmith.models.load import load_reward_model

HEAD = "score"


def build_reward_model(method: Method, pad_token_id: int) -> Any:
    """The model, ready to train: a new seeded head, and the method's trainable parameters."""
    import torch
    from peft import get_peft_model

    from tunesmith.engine.modeling.checkpointing import enable_checkpointing

    torch.manual_seed(method.adapter.seed)
    quantised = method.quantization(skip=[HEAD]) if isinstance(method, QLora) else None
    base = load_reward_model(method.folder, dtype=method.compute_dtype, quantization_config=quantised)
    base.config.pad_token_id = pad_token_id
    enable_checkpointing(base, method.gradient_checkpointing)
    if method.name == "full":
        return base
    return get_peft_model(base, adapter_config(base, method.adapter, task_type="SEQ_CLS", heads=[HEAD]))


def load_trained_reward_model(method: Method, checkpoint: Path) -> Any:
    """The trained reward model of full fine-tuning or LoRA, merged into plain float32 weights."""
    from peft import PeftModel

    if method.name == "full":
        return load_reward_model(checkpoint, dtype="float32")
    base = load_reward_model(method.folder, dtype=method.compute_dtype)  # rounded as in training
    return PeftModel.from_pretrained(base, checkpoint).float().merge_and_unload(safe_merge=True)
