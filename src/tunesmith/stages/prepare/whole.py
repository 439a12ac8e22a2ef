"""What only the whole set can tell: duplicates, leaks, conflicts, balance, mixture, and the draw of the held-out rows.

Of a row some hundred bytes are kept in memory (digests, class, source, place), never the row.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tunesmith.quality import Conflicts, Finding, NearDuplicates, RowFacts, SetStatistics, balance
from tunesmith.recipe import QUALITY, DataSection, settled
from tunesmith.stages.prepare.mixture import kept_of_each
from tunesmith.stages.prepare.work import Made, Rejection, near_tests

TRAIN, HELDOUT, OUT = 0, 1, 2
_DIGITS = 10  # of a line number that takes more than 32 bits

#: Why a row that passed alone is left out of the set, and what else is told.
Say = Callable[[str, Finding], None]
Reject = Callable[[Rejection], None]


class WholeSet:
    """Takes rows one by one, in order, then settles what becomes of each: `splits` has TRAIN, HELDOUT or OUT for it."""

    def __init__(self, data: DataSection, seed: int, say: Say, reject: Reject, kind: str = "conversation") -> None:
        """`kind` is what a row is called where another one equals it."""
        self._data, self._seed, self._say, self._reject, self._kind = data, seed, say, reject, kind
        self._actions = settled(data.quality, QUALITY)
        # An undesirable answer and a desirable one may be nearly the same: that is what they teach.
        threshold, num_perm = data.duplicates.threshold or 1.0, data.duplicates.num_perm
        self._near = {unwanted: NearDuplicates(threshold, num_perm) for unwanted in (False, True)}
        self._near_tests = near_tests(data)
        self._first = _Keys()
        self._test_keys: set[int] = set()
        self._test_prompts: set[int] = set()
        self._places = _Places([part.path for part in data.parts])
        self._conflicts = Conflicts()
        self._statistics = SetStatistics(data)
        self._answers, self._languages = array("I"), _Names()
        self._prompts, self._sources = array("Q"), array("H")
        #: In how many rows of the intermediate file each stands.
        self.pieces = array("I")
        self._labels = _Names()
        self.splits = bytearray()

    def add_test(self, key: int, prompt: str | None, signature: np.ndarray | None, where: str) -> None:
        """Remember a test row: train rows that equal it, nearly equal it or ask the same will be left out."""
        self._test_keys.add(key)
        if prompt is not None:
            self._test_prompts.add(int(prompt[:16], 16))
        if signature is not None:
            self._near_tests.remember(where, signature)

    def add(self, row: Made) -> None:
        """Take a row; an equal or nearly equal earlier one, or one of the test set, leaves it out at once."""
        number = len(self.splits)
        self._places.append(row.where, row.source)
        self._sources.append(row.source)
        self.pieces.append(row.pieces)
        self._prompts.append(int(row.prompt[:16], 16) if row.prompt else 0)
        self._labels.append(row.label)
        self._answers.append(row.facts.answer_characters)
        self._languages.append(row.facts.language)
        self.splits.append(TRAIN)
        for finding in row.findings:
            self._say(row.where, finding)
        if (reason := self._alike(row, number)) is not None:
            self._leave_out(number, *reason)
            return
        self._statistics.add(row.facts)
        if row.prompt is not None and row.answer is not None:
            self._conflicts.add(number, row.prompt, row.answer)

    def _alike(self, row: Made, number: int) -> tuple[str, str] | None:
        """Reason and detail of a row that another one makes superfluous."""
        if (leak := self._leak(row)) is not None:
            return "leaks-test", leak
        first = self._first.put(row.key, number)
        if first is not None:
            return "duplicate", f"the same {self._kind} as {self._places[first]}"
        earlier = None if row.signature is None else self._near[row.unwanted].add(row.where, row.signature)
        if earlier is None:
            return None
        finding = Finding("near-duplicate", self._actions["near-duplicate"], f"nearly the same as {earlier}")
        self._say(row.where, finding)
        return ("near-duplicate", finding.detail) if finding.action == "reject" else None

    def _leak(self, row: Made) -> str | None:
        """Why a row would tell of a test row."""
        if row.key in self._test_keys:
            return f"the same {self._kind} as a test row"
        if row.prompt is not None and int(row.prompt[:16], 16) in self._test_prompts:
            return "asks the same as a test row"
        if any(int(prompt[:16], 16) in self._test_prompts for prompt in row.earlier):
            return "asks the same as a test row, in an earlier turn"
        test = None if row.test_signature is None else self._near_tests.find(row.test_signature)
        return None if test is None else f"nearly the same as test row {test}"

    def _leave_out(self, number: int, reason: str, detail: str, *, unused: bool = False) -> None:
        self.splits[number] = OUT
        self._reject(Rejection(self._places[number], self._sources[number], reason, detail, unused))

    def _left(self) -> list[int]:
        return [number for number, split in enumerate(self.splits) if split != OUT]

    def _keep(self, rows: Sequence[int], kept: Sequence[int], reason: str, detail: str) -> None:
        """Leave those of `rows` unused that do not stand at one of the `kept` indices."""
        chosen = set(kept)
        for index, number in enumerate(rows):
            if index not in chosen:
                self._leave_out(number, reason, detail, unused=True)

    def settle(self, heldout: float) -> dict[str, dict[str, int]]:
        """Decide of all rows: set-wide findings, conflicts, balance, mixture, `max_rows`, held out. Returns classes' sizes."""
        self._near_tests = NearDuplicates()
        self._near.clear()  # the largest of what is kept, and no row is compared any more
        for number in self._left():
            self._find(number)
        self._find_conflicts()
        classes = self._balance()
        self._mix()
        if (limit := self._data.max_rows) is not None and len(rows := self._left()) > limit:
            chosen = random.Random(self._seed).sample(range(len(rows)), limit)
            self._keep(rows, chosen, "over-max-rows", f"data.max_rows is {limit}")
        self._hold_out(heldout)
        return classes

    def _find(self, number: int) -> None:
        for finding in self._statistics.findings(RowFacts(self._answers[number], self._languages[number])):
            self._say(self._places[number], finding)
            if finding.action == "reject":
                self._leave_out(number, finding.rule, finding.detail)
                return

    def _find_conflicts(self) -> None:
        action = self._actions.get("conflicting-answers")
        if action is None:
            return
        later: dict[int, str] = {}
        for conflict in self._conflicts.report():
            detail = f"another answer than {self._places[conflict.numbers[0]]} to the same prompt"
            later |= dict.fromkeys(conflict.numbers[1:], detail)
        for number in sorted(later):
            if self.splits[number] != OUT:
                detail = later[number]
                self._say(self._places[number], Finding("conflicting-answers", action, detail))
                if action == "reject":
                    self._leave_out(number, "conflicting-answers", detail)

    def _balance(self) -> dict[str, dict[str, int]]:
        if self._data.balance.label is None:
            return {}
        rows = self._left()
        labels = [self._labels[number] for number in rows]
        kept = balance(labels, self._data.balance, self._seed)
        self._keep(rows, kept, "balanced-out", "its class has more rows than data.balance allows")
        before, after = Counter(labels), Counter(labels[index] for index in kept)
        names = sorted(before, key=str)
        return {str(name): {"before": before[name], "after": after[name]} for name in names}

    def _mix(self) -> None:
        rows = self._left()
        kept = kept_of_each([self._sources[number] for number in rows], self._data, self._seed)
        self._keep(rows, kept, "over-mixture", "its source has more rows than its share of the mixture")

    def _hold_out(self, share: float) -> None:
        """Draw the held-out rows: at least one where there are two; train rows that ask the same are left out."""
        rows = self._left()
        count = min(len(rows) - 1, max(1, round(share * len(rows)))) if share > 0 and rows else 0
        for index in random.Random(self._seed + 1).sample(range(len(rows)), count):
            self.splits[rows[index]] = HELDOUT
        asked = {self._prompts[number] for number in rows if self.splits[number] == HELDOUT} - {0}
        for number in rows:
            if self.splits[number] == TRAIN and self._prompts[number] in asked:
                self._leave_out(number, "leaks-heldout", "asks the same as a held-out row")

    @property
    def sources(self) -> Sequence[int]:
        """The number of each row's source."""
        return self._sources


class _Names:
    """A list of texts, or None, of which there are few different ones: 4 bytes each."""

    def __init__(self) -> None:
        self._numbers, self._known = array("I"), dict[str | None, int]()
        self._names: list[str | None] = []

    def append(self, name: str | None) -> None:
        number = self._known.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        self._numbers.append(number)

    def __getitem__(self, row: int) -> str | None:
        return self._names[self._numbers[row]]


class _Keys:
    """The first row of each 64-bit key: an open table, 12 bytes a place, at most four fifths of them used."""

    def __init__(self) -> None:
        self._make(1 << 12)
        self._used = 0

    def _make(self, places: int) -> None:
        self._keys, self._numbers = array("Q", bytes(8 * places)), array("I", bytes(4 * places))

    def put(self, key: int, number: int) -> int | None:
        """The number under which the key stands; else None, and it stands under this one from here on."""
        if 5 * (self._used + 1) > 4 * len(self._keys):
            keys, numbers = self._keys, self._numbers
            self._make(2 * len(keys))
            for other, earlier in zip(keys, numbers, strict=True):
                if earlier:
                    self._set(other, earlier)
        place = self._place(key)
        if self._numbers[place]:
            return self._numbers[place] - 1
        self._set(key, number + 1)  # 0 is an empty place
        self._used += 1
        return None

    def _place(self, key: int) -> int:
        """Where the key stands, or would."""
        mask = len(self._keys) - 1
        place = key & mask
        while self._numbers[place] and self._keys[place] != key:
            place = (place + 1) & mask
        return place

    def _set(self, key: int, number: int) -> None:
        place = self._place(key)
        self._keys[place], self._numbers[place] = key, number


class _Places:
    """Where rows stand: a line of their source takes 6 bytes, anything else its text too."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._of, self._numbers = array("H"), array("I")  # source + 1 and line; or 0 and a place in `_others`
        self._others: list[str] = []

    def append(self, where: str, source: int) -> None:
        path, _, line = where.rpartition(":")
        plain = path == self._paths[source] and line.isascii() and line.isdigit() and line[0] != "0" and len(line) < _DIGITS
        self._of.append(source + 1 if plain else 0)
        self._numbers.append(int(line) if plain else len(self._others))
        if not plain:
            self._others.append(where)

    def __getitem__(self, number: int) -> str:
        source, kept = self._of[number], self._numbers[number]
        return f"{self._paths[source - 1]}:{kept}" if source else self._others[kept]
