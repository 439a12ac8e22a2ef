"""Stage `export`: `train/` in, `export/<name>/` out (a plain model folder that serves, with proof.json)."""

from tunesmith.stages.export.stage import export

__all__ = ["export"]
