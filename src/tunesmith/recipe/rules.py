"""The rules that check rows, as data: what each one looks for, and its default action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Action = Literal["warn", "fix", "reject"]
Setting = Literal["warn", "fix", "reject", "off"]


@dataclass(frozen=True)
class Rule:
    """One rule: its default, what it finds, and whether it can repair what it finds (`fix`)."""

    default: Setting
    what: str
    fixable: bool = False


#: What `data.quality` may name.
QUALITY: dict[str, Rule] = {
    "empty-answer": Rule("reject", "an answer that is missing, or only spaces and control characters"),
    "one-word-answer": Rule("off", "a one-word answer (valid for classification, hence off)"),
    "answer-repeats-prompt": Rule("reject", "an answer that repeats a question of five words or more"),
    "cut-off-answer": Rule("warn", "an answer that stops mid-sentence, or inside an open code block or bracket"),
    "refusal": Rule("warn", "an answer that begins with a refusal"),
    "repetition": Rule("warn", "an answer that mostly repeats the same line, sentence or words"),
    "non-alternating-roles": Rule(
        "warn", "two turns in a row with the same role, a late system turn, or an answer as the first turn", fixable=True
    ),
    "wrong-language": Rule("warn", "an answer in a different language than nine of ten answers in the set"),
    "length-outlier": Rule("warn", "an answer far longer or shorter than the others in the set"),
    "near-duplicate": Rule("reject", "a near-duplicate of an earlier row (`data.duplicates`)"),
    "conflicting-answers": Rule("warn", "a different answer to the same prompt as an earlier row"),
    "benchmark-overlap": Rule("warn", "a run of 13 words that also occurs in a benchmark (`data.overlap`)"),
}

#: Quality rules that need neither turns nor answers, so they check raw text too.
OF_TEXTS = ("near-duplicate", "benchmark-overlap")

#: What `data.screening` may name.
SCREENING: dict[str, Rule] = {
    "secret": Rule("reject", "a key, token or password in a known format", fixable=True),
    "high-entropy": Rule("warn", "a random-looking string next to a word such as key or token", fixable=True),
    "email": Rule("warn", "an e-mail address, except at reserved example domains", fixable=True),
    "phone": Rule("warn", "a phone number in international or North American format", fixable=True),
    "iban": Rule("warn", "a bank account number with a valid checksum", fixable=True),
    "card": Rule("warn", "a payment card number with a valid checksum", fixable=True),
    "injection": Rule("warn", "text that tells a model to ignore its instructions, or to act as one without limits"),
    "hidden-tags": Rule("reject", "text in invisible tag characters (U+E0000), except flags"),
    "hidden-unicode": Rule("warn", "long runs of invisible characters, or direction overrides"),
    "control-token": Rule("warn", "text that spells out a chat template's control token (tokenized as plain text)"),
}


def unknown_rules(given: Mapping[str, Setting], known: Mapping[str, Rule]) -> Iterable[str]:
    """What is wrong with the overrides of a recipe, one sentence each."""
    for name, setting in given.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            yield f"unknown rule {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        elif setting == "fix" and not known[name].fixable:
            yield f"rule {name!r} cannot fix what it finds: use warn, reject or off"


def settled(given: Mapping[str, Setting], known: Mapping[str, Rule]) -> dict[str, Action]:
    """The action of each rule that is not off."""
    found: dict[str, Action] = {}
    for name, rule in known.items():
        setting = given.get(name, rule.default)
        if setting != "off":
            found[name] = setting
    return found
