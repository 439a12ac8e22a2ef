"""LoRA: a frozen base with trainable low-rank adapters on its linear layers (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.errors import Problem, RecipeError
from tunesmith.io.atomic import read_json, write_json
from tunesmith.methods.base import AdapterSettings, Method
from tunesmith.models.load import load_model


def adapter_targets(model: Any, asked: str | list[str]) -> str | list[str]:
    """Which modules get an adapter: the requested ones, but in a mixture of experts `all-linear` means only linear layers.

    PEFT would adapt the experts' 3-D weights too, and materialise each adapter's full delta weight in every step: as much
    memory as a second set of experts.
    """
    if asked != "all-linear" or not any(getattr(model.config, key, None) for key in ("num_experts", "num_local_experts")):
        return asked
    import torch

    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    return sorted({name.rpartition(".")[2] for name in linear})


def trains_embedding(model: Any, asked: Sequence[str]) -> bool:
    """Whether the embedding is among the fully trained modules, matched by the end of their names as in PEFT.

    Raises RecipeError if a name matches nothing, anything but an embedding, the head or a norm, or a tied head.
    """
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    leaves = {name: module for name, module in model.named_modules() if name and not list(module.children())}
    norms = sorted({name.rpartition(".")[2] for name in leaves if name.endswith("norm")})
    found = []
    for ending in asked:
        fitting = [name for name in leaves if name.endswith(ending)]
        linear = [name for name in fitting if isinstance(leaves[name], torch.nn.Linear) and leaves[name] is not head]
        if not fitting or linear:
            what = f"{linear[0]} is a linear layer" if linear else f"no embedding, head or norm ends in {ending!r}"
            why = "linear layers have an adapter" if linear else "nothing would be trained for it"
            raise RecipeError(_saved_problem(what, why, norms))
        found += [leaves[name] for name in fitting]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    with_embedding = any(module is embedding for module in found)
    if tied and not with_embedding and any(module is head for module in found):
        raise RecipeError(_saved_problem("the head is the embedding in this model", "they would no longer be tied", norms))
    return with_embedding


def _saved_problem(what: str, why: str, norms: Sequence[str]) -> Problem:
    fix = f"name some of embed_tokens, lm_head (where it is not tied), {', '.join(norms)}; or train all with method: full"
    return Problem("TS003", f"lora.modules_to_save: {what}", "lora", why, fix)


def adapter_config(model: Any, asked: AdapterSettings, *, heads: Sequence[str] = (), **more: Any) -> Any:
    """PEFT's configuration of the requested adapter on `model`; `more` are other keys of it, such as `task_type`.

    `heads` are new layers that are fully trained.
    """
    from peft import LoraConfig

    if trains_embedding(model, asked.modules_to_save) and model.config.tie_word_embeddings:
        more["ensure_weight_tying"] = True
    return LoraConfig(
        modules_to_save=[*asked.modules_to_save, *heads] or None,
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

    def load_base(self) -> Any:
        """The frozen base model."""
        return load_model(self.folder, **self.as_loaded)

    def build(self) -> Any:
        import torch
        from peft import get_peft_model

        from tunesmith.engine.modeling.adapter import fuse_adapters
        from tunesmith.engine.modeling.blocks import fuse_blocks
        from tunesmith.engine.modeling.checkpointing import enable_checkpointing

        base = self.load_base()
        fuse_blocks(base)
        enable_checkpointing(base, self.gradient_checkpointing)
        config = adapter_config(base, self.adapter, task_type="CAUSAL_LM")
        torch.manual_seed(self.adapter.seed)
        model = get_peft_model(base, config)  # makes the adapters float32
        fuse_adapters(model)
        return model

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        for extra in folder.glob("README.md"):
            extra.unlink()  # PEFT's model card is an empty template
        path = folder / "adapter_config.json"
        config = read_json(path)
        # PEFT keeps the names as a set, whose order differs between processes.
        modules = config["target_modules"]
        write_json(path, {**config, "target_modules": sorted(modules) if isinstance(modules, list) else modules})

    def load_trained(self, folder: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.load_base(), folder).float()

    def merge(self, model: Any) -> Any:
        return model.merge_and_unload(safe_merge=True)
