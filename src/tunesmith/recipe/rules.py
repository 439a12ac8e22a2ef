"""The rules that rows are checked by, as data: what each looks for and what it does unless the recipe says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Action = Literal["warn", "fix", "reject"]
Setting = Literal["warn", "fix", "reject", "off"]


@dataclass(frozen=True)
class Rule:
    """One rule: its default, what it finds, and whether it can mend what it finds (`fix`)."""

    default: Setting
    what: str
    fixable: bool = False


#: What `data.quality` may name.
QUALITY: dict[str, Rule] = {
    "empty-answer": Rule("reject", "an answer of spaces and control characters alone, or none at all"),
    "one-word-answer": Rule("off", "an answer of one word (right for classification, hence off)"),
    "answer-repeats-prompt": Rule("reject", "an answer that is the question again, of five words or more"),
    "cut-off-answer": Rule("warn", "an answer that stops in mid-sentence, or in an open code block or bracket"),
    "refusal": Rule("warn", "an answer that begins by refusing"),
    "repetition": Rule("warn", "an answer that is mostly the same line, sentence or words over and over"),
    "non-alternating-roles": Rule(
        "warn", "two turns of one role in a row, a late system turn, or an answer first", fixable=True
    ),
    "wrong-language": Rule("warn", "an answer in another language than nine of ten answers of the set"),
    "length-outlier": Rule("warn", "an answer far longer or shorter than those of the set"),
    "near-duplicate": Rule("reject", "a row nearly the same as an earlier one (`data.duplicates`)"),
    "conflicting-answers": Rule("warn", "another answer than an earlier row has to the same prompt"),
    "benchmark-overlap": Rule("warn", "a run of 13 words that a benchmark has too (`data.overlap`)"),
}

#: Rules of quality that need neither turns nor answers, so that raw text is checked by them too.
OF_TEXTS = ("near-duplicate", "benchmark-overlap")

#: What `data.screening` may name.
SCREENING: dict[str, Rule] = {
    "secret": Rule("reject", "a key, token or password of a known form", fixable=True),
    "high-entropy": Rule("warn", "a random-looking string beside a word such as key or token", fixable=True),
    "email": Rule("warn", "an e-mail address, reserved example domains apart", fixable=True),
    "phone": Rule("warn", "a phone number in international or North American form", fixable=True),
    "iban": Rule("warn", "a bank account number whose checksum is right", fixable=True),
    "card": Rule("warn", "a payment card number whose checksum is right", fixable=True),
    "injection": Rule("warn", "text that tells a model to forget its instructions, or to play one without limits"),
    "hidden-tags": Rule("reject", "text in the invisible tag characters (U+E0000), flags apart"),
    "hidden-unicode": Rule("warn", "long runs of invisible characters, or direction overrides"),
    "control-token": Rule("warn", "text that spells a chat template's control token (it is trained on as text)"),
}


def unknown_rules(given: Mapping[str, Setting], known: Mapping[str, Rule]) -> Iterable[str]:
    """What is wrong with the overrides of a recipe, a sentence each."""
    for name, setting in given.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            yield f"unknown rule {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        elif setting == "fix" and not known[name].fixable:
            yield f"rule {name!r} cannot fix what it finds: use warn, reject or off"


def settled(given: Mapping[str, Setting], known: Mapping[str, Rule]) -> dict[str, Action]:
    """What each rule does, those that are off left out."""
    found: dict[str, Action] = {}
    for name, rule in known.items():
        setting = given.get(name, rule.default)
        if setting != "off":
            found[name] = setting
    return found
