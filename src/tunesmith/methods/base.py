"""The interface of a method: how to load, what is trainable, how to save, how to merge.

The training loop, export and evaluate know only this interface; none of their code asks which method it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.recipe import Checkpointing, RopeScalingSection


@dataclass(frozen=True)
class AdapterSettings:
    """PEFT's LoRA settings, without `auto` values. `seed` seeds the adapter's initialisation."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    seed: int
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt the model in `folder`, with matmuls in `compute_dtype` ("float32" or "bfloat16")."""

    folder: Path
    compute_dtype: str
    adapter: AdapterSettings
    gradient_checkpointing: Checkpointing = False
    rope_scaling: RopeScalingSection | None = None

    name: ClassVar[str]
    #: Peak learning rate if the recipe says `auto`.
    default_learning_rate: ClassVar[float]

    @property
    def as_loaded(self) -> dict[str, Any]:
        """Arguments of `load_model` for the base model, apart from its folder."""
        return {"dtype": self.compute_dtype, "rope_scaling": self.rope_scaling}

    @abstractmethod
    def build(self) -> Any:
        """The model, ready to train: loaded, prepared, and only its trainable parameters require gradients."""

    def reference(self) -> Any | None:
        """The untrained reference model as a separate model; None if it is the base below the adapter."""
        return None

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained (weights or adapter) into `folder`, as safetensors and JSON only."""

    @abstractmethod
    def load_trained(self, folder: Path) -> Any:
        """The trained model loaded from what `save` wrote, computing in float32: the reference for an export.

        Its weights are the ones used in training, with the same rounding or quantisation.
        """

    @abstractmethod
    def merge(self, model: Any) -> Any:
        """A plain float32 transformers model equivalent to `model` (from `load_trained`), which must not be used afterwards."""

    def trainable_parameters(self, model: Any) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
