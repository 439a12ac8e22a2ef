"""Findings that need the whole set: answers in another language than the others, answers of an unusual length.

Two passes: `row_facts` of every row into `SetStatistics.add`; then `findings` of each row's facts. Facts are small: keep
them, or make them again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.quality.findings import Finding, Message, texts
from tunesmith.quality.language import language
from tunesmith.recipe import QUALITY, DataSection, settled

_SHARE = 0.9  # of the answers whose language is told: then it is the set's language
_LEAST_ROWS = 50  # fewer rows are no statistics
_SPREADS = 3.5  # beyond so many robust standard deviations of the logarithm
_LEAST_FACTOR = 4.0  # and at least so many times longer or shorter than the median
_MOST_OUTLIERS = 0.05  # of the rows: more are no outliers but another kind of answer, such as `[]` beside long lists
_BINS = 64  # bins of an octave of length: 1.1 % wide


@dataclass(frozen=True)
class RowFacts:
    """Of one row: characters of its answers, and their language (None where it cannot be told)."""

    answer_characters: int
    language: str | None


def row_facts(messages: Sequence[Message]) -> RowFacts:
    """Facts of a row for the set's statistics; for workers."""
    answers = [text for _, text in texts(messages, "assistant")]
    return RowFacts(sum(map(len, answers)), language("\n".join(answers)))


class SetStatistics:
    """Languages and lengths of a set; memory does not grow with the rows."""

    def __init__(self, data: DataSection) -> None:
        self._actions = settled(data.quality, QUALITY)
        self._languages: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._limits: tuple[float, float] | None = None

    def add(self, facts: RowFacts) -> None:
        """Count one row."""
        self._limits = None
        if facts.language is not None:
            self._languages[facts.language] += 1
        if facts.answer_characters:
            self._lengths[round(_BINS * math.log2(facts.answer_characters))] += 1

    @property
    def language(self) -> str | None:
        """The language of nine of ten answers; None where there is none such, or too few rows to tell."""
        total = self._languages.total()
        if total < _LEAST_ROWS:
            return None
        code, count = self._languages.most_common(1)[0]
        return code if count >= _SHARE * total else None

    @property
    def limits(self) -> tuple[float, float]:
        """Shortest and longest answer in characters that is not unusual: median and deviation of the logarithms.

        No limits where more than one answer in twenty would be outside: then the set has several kinds of answers.
        """
        if self._limits is None:
            self._limits = self._make_limits()
        return self._limits

    def _make_limits(self) -> tuple[float, float]:
        if self._lengths.total() < _LEAST_ROWS:
            return 0.0, math.inf
        middle = _median(self._lengths)
        deviations: Counter[int] = Counter()
        for value, count in self._lengths.items():
            deviations[abs(value - middle)] += count
        # 1.4826 makes the median absolute deviation that of a normal distribution.
        width = max(_SPREADS * 1.4826 * _median(deviations), _BINS * math.log2(_LEAST_FACTOR))
        outside = sum(count for deviation, count in deviations.items() if deviation > width)
        if outside > _MOST_OUTLIERS * self._lengths.total():
            return 0.0, math.inf
        return 2 ** ((middle - width) / _BINS), 2 ** ((middle + width) / _BINS)

    def findings(self, facts: RowFacts) -> list[Finding]:
        """What this row's facts are among those of all rows that were added."""
        found = []
        usual = self.language
        if (action := self._actions.get("wrong-language")) and usual and facts.language not in (None, usual):
            found.append(Finding("wrong-language", action, f"{facts.language} in a set of {usual}"))
        shortest, longest = self.limits
        length = facts.answer_characters
        if (action := self._actions.get("length-outlier")) and length and not shortest <= length <= longest:
            usually = f"usual are {shortest:.0f} to {longest:.0f}"
            found.append(Finding("length-outlier", action, f"{length} characters, {usually}"))
        return found


def _median(counts: Counter[int]) -> int:
    """The middle one of values with their counts."""
    left = counts.total() // 2
    for value in sorted(counts):
        left -= counts[value]
        if left < 0:
            return value
    raise AssertionError("no values")
