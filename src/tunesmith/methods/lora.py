"""LoRA: the base is frozen, low-rank adapters on its linear layers are trained (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tunesmith.io.atomic import read_json, write_json
from tunesmith.methods.base import AdapterSettings, Method, enable_checkpointing
from tunesmith.models.load import load_model


def adapter_targets(model: Any, asked: str | list[str]) -> str | list[str]:
    """Which modules get an adapter: what was asked for, but in a mixture of experts `all-linear` means linear layers alone.

    PEFT would adapt the experts' 3-D weights too, by making the whole product of each adapter a weight again in every step:
    as much memory as a second set of experts.
    """
    if asked != "all-linear" or not any(getattr(model.config, key, None) for key in ("num_experts", "num_local_experts")):
        return asked
    import torch

    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    return sorted({name.rpartition(".")[2] for name in linear})


def adapter_config(model: Any, asked: AdapterSettings, **more: Any) -> Any:
    """PEFT's configuration of the adapter that is asked for on `model`; `more` are other keys of it, such as `task_type`."""
    from peft import LoraConfig

    return LoraConfig(
        r=asked.r,
        lora_alpha=asked.lora_alpha,
        lora_dropout=asked.lora_dropout,
        target_modules=adapter_targets(model, asked.target_modules),
        use_rslora=asked.use_rslora,
        bias="none",
        **more,
    )


class Lora(Method):
    """Frozen base in the compute dtype; adapters kept in float32, multiplied in the compute dtype."""

    name: ClassVar[str] = "lora"
    default_learning_rate: ClassVar[float] = 2e-4

    def load_base(self) -> Any:
        """The frozen base model."""
        return load_model(self.folder, **self.as_loaded)

    def build(self) -> Any:
        import torch
        from peft import get_peft_model

        from tunesmith.methods.adapter import fuse_adapters
        from tunesmith.methods.blocks import fuse_blocks

        base = self.load_base()
        fuse_blocks(base)
        if self.gradient_checkpointing:
            enable_checkpointing(base)
        config = adapter_config(base, self.adapter, task_type="CAUSAL_LM")
        torch.manual_seed(self.adapter.seed)
        model = get_peft_model(base, config)  # makes the adapters float32
        fuse_adapters(model)
        return model

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        for extra in folder.glob("README.md"):
            extra.unlink()  # PEFT's model card is an empty form
        path = folder / "adapter_config.json"
        config = read_json(path)
        # PEFT keeps the names as a set, whose order is another one in each process.
        modules = config["target_modules"]
        write_json(path, {**config, "target_modules": sorted(modules) if isinstance(modules, list) else modules})

    def load_trained(self, folder: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.load_base(), folder).float()

    def merge(self, model: Any) -> Any:
        return model.merge_and_unload(safe_merge=True)
