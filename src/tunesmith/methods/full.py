"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tunesmith.methods.base import Method
from tunesmith.models.load import load_model


class Full(Method):
    """All weights, in the compute dtype; the optimizer keeps float32 masters, so small updates are not rounded away."""

    name: ClassVar[str] = "full"

    def build(self) -> Any:
        from tunesmith.engine.modeling.blocks import fuse_blocks
        from tunesmith.engine.modeling.checkpointing import enable_checkpointing

        model = load_model(self.folder, **self.as_loaded)
        fuse_blocks(model)
        enable_checkpointing(model, self.gradient_checkpointing)
        return model

    def reference(self) -> Any:
        return load_model(self.folder, **self.as_loaded)

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load_trained(self, folder: Path) -> Any:
        return load_model(folder, dtype="float32")

    def merge(self, model: Any) -> Any:
        return model
