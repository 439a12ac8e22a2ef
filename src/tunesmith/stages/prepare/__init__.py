"""Stage `prepare`: raw rows in, `data/` out (Arrow with token ids and loss mask, ledger, rejects, samples)."""

from tunesmith.stages.prepare.pool import without_torch
from tunesmith.stages.prepare.stage import prepare

__all__ = ["prepare", "without_torch"]
