"""Stage `train`: recipe and `data/` in, `train/` out (checkpoint, metrics, settings, summary)."""

from tunesmith.stages.train.stage import train

__all__ = ["train"]
