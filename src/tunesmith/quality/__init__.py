"""Data quality: cleaning, near-duplicates, conflicts, overlap with benchmarks, quality and safety findings, balance.

Designed for a stage that reads rows in several processes:

    worker   Checker(data).check(messages), NearDuplicates(...).signature(row_text(messages, common)), row_facts(messages)
    parent   NearDuplicates.add, Conflicts.add, SetStatistics.add, then SetStatistics.findings, Conflicts.report, balance
"""

from tunesmith.quality.balance import Label, balance
from tunesmith.quality.checker import Checker
from tunesmith.quality.conflicts import Conflict, Conflicts
from tunesmith.quality.duplicates import NearDuplicates
from tunesmith.quality.findings import Finding, Message
from tunesmith.quality.overlap import Overlap
from tunesmith.quality.statistics import RowFacts, SetStatistics, row_facts
from tunesmith.quality.words import common_segments, row_text

__all__ = [
    "Checker",
    "Conflict",
    "Conflicts",
    "Finding",
    "Label",
    "Message",
    "NearDuplicates",
    "Overlap",
    "RowFacts",
    "SetStatistics",
    "balance",
    "common_segments",
    "row_facts",
    "row_text",
]
