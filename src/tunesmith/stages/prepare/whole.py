"""Decisions that need the whole set: duplicates, leaks, conflicts, balance, mixture, and the draw of the held-out rows.

Memory holds some hundred bytes per row (digests, class, source, location), never the row.
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
_DIGITS = 10  # a line number with so many digits may need more than 32 bits

#: Callbacks: report a finding of a row, and leave out a row that passed on its own.
Say = Callable[[str, Finding], None]
Reject = Callable[[Rejection], None]


class WholeSet:
    """Takes rows one by one, in order, then decides about each: `splits` has TRAIN, HELDOUT or OUT for it."""

    def __init__(self, data: DataSection, seed: int, say: Say, reject: Reject, kind: str = "conversation") -> None:
        """`kind` is what messages call a row that equals another one."""
        self._data, self._seed, self._say, self._reject, self._kind = data, seed, say, reject, kind
        self._actions = settled(data.quality, QUALITY)
        # An undesirable and a desirable answer may be near-duplicates: their difference is what they teach.
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
        #: How many rows of the intermediate file each one takes.
        self.pieces = array("I")
        self._labels = _Names()
        self.splits = bytearray()

    def add_test(self, key: int, prompt: str | None, signature: np.ndarray | None, where: str) -> None:
        """Remember a test row: train rows that equal it, nearly equal it or have its prompt are left out."""
        self._test_keys.add(key)
        if prompt is not None:
            self._test_prompts.add(int(prompt[:16], 16))
        if signature is not None:
            self._near_tests.remember(where, signature)

    def add(self, row: Made) -> None:
        """Take a row; it is left out at once if it equals or nearly equals an earlier row or one of the test set."""
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
            self._exclude(number, *reason)
            return
        self._statistics.add(row.facts)
        if row.prompt is not None and row.answer is not None:
            self._conflicts.add(number, row.prompt, row.answer)

    def _alike(self, row: Made, number: int) -> tuple[str, str] | None:
        """Reason and detail if another row makes this one redundant."""
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
        """Why a row would leak a test row."""
        if row.key in self._test_keys:
            return f"the same {self._kind} as a test row"
        if row.prompt is not None and int(row.prompt[:16], 16) in self._test_prompts:
            return "has the prompt of a test row"
        if any(int(prompt[:16], 16) in self._test_prompts for prompt in row.earlier):
            return "has the prompt of a test row, in an earlier turn"
        test = None if row.test_signature is None else self._near_tests.find(row.test_signature)
        return None if test is None else f"nearly the same as test row {test}"

    def _exclude(self, number: int, reason: str, detail: str, *, unused: bool = False) -> None:
        self.splits[number] = OUT
        self._reject(Rejection(self._places[number], self._sources[number], reason, detail, unused))

    def _left(self) -> list[int]:
        return [number for number, split in enumerate(self.splits) if split != OUT]

    def _keep(self, rows: Sequence[int], kept: Sequence[int], reason: str, detail: str) -> None:
        """Mark those of `rows` as unused whose index is not in `kept`."""
        chosen = set(kept)
        for index, number in enumerate(rows):
            if index not in chosen:
                self._exclude(number, reason, detail, unused=True)

    def settle(self, heldout: float) -> dict[str, dict[str, int]]:
        """Decide about all rows: set-wide findings, conflicts, balance, mixture, `max_rows`, held-out. Returns class sizes."""
        self._near_tests = NearDuplicates()
        self._near.clear()  # the largest state kept, and no more rows are compared
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
                self._exclude(number, finding.rule, finding.detail)
                return

    def _find_conflicts(self) -> None:
        action = self._actions.get("conflicting-answers")
        if action is None:
            return
        later: dict[int, str] = {}
        for conflict in self._conflicts.report():
            detail = f"a different answer than {self._places[conflict.numbers[0]]} to the same prompt"
            later |= dict.fromkeys(conflict.numbers[1:], detail)
        for number in sorted(later):
            if self.splits[number] != OUT:
                detail = later[number]
                self._say(self._places[number], Finding("conflicting-answers", action, detail))
                if action == "reject":
                    self._exclude(number, "conflicting-answers", detail)

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
        """Draw the held-out rows, at least one if there are two rows; train rows with the same prompt are left out."""
        rows = self._left()
        count = min(len(rows) - 1, max(1, round(share * len(rows)))) if share > 0 and rows else 0
        for index in random.Random(self._seed + 1).sample(range(len(rows)), count):
            self.splits[rows[index]] = HELDOUT
        asked = {self._prompts[number] for number in rows if self.splits[number] == HELDOUT} - {0}
        for number in rows:
            if self.splits[number] == TRAIN and self._prompts[number] in asked:
                self._exclude(number, "leaks-heldout", "has the prompt of a held-out row")

    @property
    def sources(self) -> Sequence[int]:
        """Each row's source index."""
        return self._sources


class _Names:
    """A list of strings or None with few distinct values: 4 bytes each."""

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
    """The first row of each 64-bit key: an open-addressing hash table, 12 bytes per slot, at most four fifths full."""

    def __init__(self) -> None:
        self._make(1 << 12)
        self._used = 0

    def _make(self, places: int) -> None:
        self._keys, self._numbers = array("Q", bytes(8 * places)), array("I", bytes(4 * places))

    def put(self, key: int, number: int) -> int | None:
        """The number stored for the key; if there is none, stores this one and returns None."""
        if 5 * (self._used + 1) > 4 * len(self._keys):
            keys, numbers = self._keys, self._numbers
            self._make(2 * len(keys))
            for other, earlier in zip(keys, numbers, strict=True):
                if earlier:
                    self._set(other, earlier)
        place = self._place(key)
        if self._numbers[place]:
            return self._numbers[place] - 1
        self._set(key, number + 1)  # 0 is an empty slot
        self._used += 1
        return None

    def _place(self, key: int) -> int:
        """The key's slot, or the one where it would go."""
        mask = len(self._keys) - 1
        place = key & mask
        while self._numbers[place] and self._keys[place] != key:
            place = (place + 1) & mask
        return place

    def _set(self, key: int, number: int) -> None:
        place = self._place(key)
        self._keys[place], self._numbers[place] = key, number


class _Places:
    """Where rows come from: a line of their source takes 6 bytes, anything else its text too."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._of, self._numbers = array("H"), array("I")  # source + 1 and line; or 0 and an index into `_others`
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
