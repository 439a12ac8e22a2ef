"""Full fine-tuning, LoRA and QLoRA behind one interface (`base.Method`)."""

from __future__ import annotations

from pathlib import Path

from tunesmith.methods.base import AdapterSettings, Method
from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora, adapter_config
from tunesmith.methods.qlora import QLora
from tunesmith.recipe import Recipe

METHODS: dict[str, type[Method]] = {"full": Full, "lora": Lora, "qlora": QLora}

__all__ = ["METHODS", "AdapterSettings", "Method", "adapter_config", "make_method"]


def make_method(recipe: Recipe, folder: Path, *, compute_dtype: str, r: int, lora_alpha: int) -> Method:
    """The recipe's method for the model in `folder`, with the recipe's `auto` values resolved."""
    adapter = AdapterSettings(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=recipe.lora.target_modules,
        use_rslora=recipe.lora.use_rslora,
        seed=recipe.seed,
        modules_to_save=tuple(recipe.lora.modules_to_save),
    )
    return METHODS[recipe.method](folder, compute_dtype, adapter, recipe.train.gradient_checkpointing, recipe.rope_scaling)
