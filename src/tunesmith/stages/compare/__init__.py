"""Stage `compare`: several runs in, one table out (compare.json, report.html)."""

from tunesmith.stages.compare.stage import COMPARISON, compare

__all__ = ["COMPARISON", "compare"]
