"""Findings that need the whole set: answers in a different language than the rest, answers of unusual length.

Two passes: pass `row_facts` of every row to `SetStatistics.add`, then call `findings` with each row's facts. Facts are small:
keep them or recompute them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.quality.findings import Finding, Message, texts
from tunesmith.quality.language import language
from tunesmith.recipe import QUALITY, DataSection, settled

_SHARE = 0.9  # of the answers with a detected language; above this it is the set's language
_LEAST_ROWS = 50  # fewer rows give no meaningful statistics
_SPREADS = 3.5  # robust standard deviations of the logarithm beyond which a length is unusual
_LEAST_FACTOR = 4.0  # and the least factor by which it is longer or shorter than the median
_MOST_OUTLIERS = 0.05  # share of rows; more than that are another kind of answer, such as `[]` among long lists
_BINS = 64  # bins per doubling of the length, each 1.1 % wide


@dataclass(frozen=True)
class RowFacts:
    """Facts of one row: characters of its answers, and their language (None if it cannot be detected)."""

    answer_characters: int
    language: str | None


def row_facts(messages: Sequence[Message]) -> RowFacts:
    """A row's facts for the set's statistics; called in workers."""
    answers = [text for _, text in texts(messages, "assistant")]
    return RowFacts(sum(map(len, answers)), language("\n".join(answers)))


class SetStatistics:
    """Languages and lengths of a set; memory does not grow with the number of rows."""

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
        """The language of at least nine in ten answers; None if there is none, or if there are too few rows."""
        total = self._languages.total()
        if total < _LEAST_ROWS:
            return None
        code, count = self._languages.most_common(1)[0]
        return code if count >= _SHARE * total else None

    @property
    def limits(self) -> tuple[float, float]:
        """Shortest and longest usual answer in characters, from the median and deviation of the logarithms.

        Without limits if more than one answer in twenty would be outside: then the set has several kinds of answers.
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
        # 1.4826 scales the median absolute deviation to the standard deviation of a normal distribution.
        width = max(_SPREADS * 1.4826 * _median(deviations), _BINS * math.log2(_LEAST_FACTOR))
        outside = sum(count for deviation, count in deviations.items() if deviation > width)
        if outside > _MOST_OUTLIERS * self._lengths.total():
            return 0.0, math.inf
        return 2 ** ((middle - width) / _BINS), 2 ** ((middle + width) / _BINS)

    def findings(self, facts: RowFacts) -> list[Finding]:
        """Findings for this row's facts, compared with all rows that were added."""
        found = []
        usual = self.language
        if (action := self._actions.get("wrong-language")) and usual and facts.language not in (None, usual):
            found.append(Finding("wrong-language", action, f"{facts.language} in a set of {usual}"))
        shortest, longest = self.limits
        length = facts.answer_characters
        if (action := self._actions.get("length-outlier")) and length and not shortest <= length <= longest:
            usually = f"usual: {shortest:.0f} to {longest:.0f}"
            found.append(Finding("length-outlier", action, f"{length} characters, {usually}"))
        return found


def _median(counts: Counter[int]) -> int:
    """The median of values given with their counts."""
    left = counts.total() // 2
    for value in sorted(counts):
        left -= counts[value]
        if left < 0:
            return value
    raise AssertionError("no values")
