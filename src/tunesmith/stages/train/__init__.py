"""Stage `train`: recipe and `data/` in, `train/` out (checkpoint, metrics, settings, summary).

Importing it does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.stages.train.inputs import is_trained

if TYPE_CHECKING:
    from tunesmith.stages.train.stage import train

__all__ = ["is_trained", "train"]


def __getattr__(name: str) -> object:
    """The function `train`, imported on first use."""
    if name == "train":
        from tunesmith.stages.train import stage

        return stage.train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
