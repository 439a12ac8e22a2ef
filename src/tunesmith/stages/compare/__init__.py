"""Stage `compare`: several runs in, one table out (compare.json, report.html)."""

from tunesmith.stages.compare.forgetting import FORGETTING_HEADERS, forgetting_cells, forgetting_verdict
from tunesmith.stages.compare.stage import COMPARISON, compare
from tunesmith.stages.compare.text import HEADERS, cells, verdict

__all__ = [
    "COMPARISON",
    "FORGETTING_HEADERS",
    "HEADERS",
    "cells",
    "compare",
    "forgetting_cells",
    "forgetting_verdict",
    "verdict",
]
