"""The interface of a method: how to load, what is trainable, how to save, how to merge.

The training loop, export and evaluate know this interface alone; no line of theirs asks which method it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.recipe import Checkpointing, RopeScalingSection


@dataclass(frozen=True)
class AdapterSettings:
    """PEFT's LoRA settings, settled. `seed` decides the adapter's random start."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    seed: int
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt the model in `folder`, multiplying in `compute_dtype` ("float32" or "bfloat16")."""

    folder: Path
    compute_dtype: str
    adapter: AdapterSettings
    gradient_checkpointing: Checkpointing = False
    rope_scaling: RopeScalingSection | None = None

    name: ClassVar[str]
    #: Peak learning rate where the recipe says `auto`.
    default_learning_rate: ClassVar[float]

    @property
    def as_loaded(self) -> dict[str, Any]:
        """What `load_model` is told of the base model, beside its folder."""
        return {"dtype": self.compute_dtype, "rope_scaling": self.rope_scaling}

    @abstractmethod
    def build(self) -> Any:
        """The model ready to train: loaded, prepared, with exactly the trainable parameters requiring gradients."""

    def reference(self) -> Any | None:
        """The untrained model beside the one that is trained; None where that is the base below its adapter."""
        return None

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained (weights or adapter) into `folder`, as safetensors and JSON only."""

    @abstractmethod
    def load_trained(self, folder: Path) -> Any:
        """The trained model from what `save` wrote, computing in float32: what an export is compared with.

        Its weights are those that training saw, rounded or quantised as they were.
        """

    @abstractmethod
    def merge(self, model: Any) -> Any:
        """One plain float32 transformers model that computes what `model` (from `load_trained`) does; uses `model` up."""

    def trainable_parameters(self, model: Any) -> int:
        """Number of parameters that training changes."""
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
