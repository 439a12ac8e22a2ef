"""Screens for content that must not be learned or leaked: secrets, personal data, injections, hidden text, control tokens.

Findings hold counts and turns, never content. All patterns were written for tunesmith; numbers with a checksum are verified
by it. Missed: secrets without a known form or a nearby word such as `key`, names and addresses, numbers written in words,
anything in an image or in base64, attacks in languages other than English, and attacks with new wording.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tunesmith.quality.findings import Finding, Message, places, texts
from tunesmith.quality.injection import injection_score
from tunesmith.recipe import Action

Places = Iterator[tuple[int, int]]  # start and end of each match in a text

#: Lower-case substrings, one of which a text must contain before a rule's full pattern is tried.
_STEMS: dict[str, tuple[str, ...]] = {
    "secret": (
        *(
            "akia",
            "asia",
            "ghp_",
            "gho_",
            "ghu_",
            "ghs_",
            "ghr_",
            "github_pat",
            "glpat-",
            "hf_",
            "sk-",
            "k_live",
            "k_test",
            "xox",
        ),
        *("aiza", "sg.", "npm_", "pypi-", "dop_v1", "eyj", "-----begin", "://"),
    ),
    "high-entropy": ("key", "secret", "token", "passw", "auth", "credential"),
    "email": ("@",),
    "control-token": ("<|", "<\uff5c", "_of_turn", "inst]", "sys>>", "s>", "mask]", "tool_calls]"),
}
_DIGITS = re.compile(r"\d(?:[ .()A-Z-]{0,2}\d){8}")
_NUMBERS = ("phone", "iban", "card")

#: Known key formats, from their vendors' documentation.
_SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{60,}\b"
    r"|\bglpat-[\w-]{20,}|\bhf_[A-Za-z]{30,}\b"
    r"|\bsk-(?:proj-|ant-|live-)?[A-Za-z0-9_-]{20,}|\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[\w-]{35}\b|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{40,}|\bdop_v1_[a-f0-9]{64}\b"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}|-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"|\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{1,64}:[^\s:/@]{3,64}@[\w.-]+"
)
_NAMED = re.compile(
    r"\b(?:api[_-]?key|secret|token|passw(?:or)?d|access[_-]?key|auth"
    r"|credential)s?\w{0,20}[\"']?\s{0,3}(?:[:=]|is)\s{0,3}[\"']?"
    r"([A-Za-z0-9+/_=.-]{16,200})",
    re.IGNORECASE,
)
_ENTROPY = 3.7  # bits per character; English words are below, random base64 of 20 characters is above 4
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}\b")
_EXAMPLE = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|test|invalid|localhost)\Z", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|\(\d{3}\)"
    r" ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(
    r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\w-])|(?<![\w.-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\w-])"
)
_TAGS = re.compile("[\U000e0000-\U000e007f]+")
_FLAG = re.compile("(?<=\U0001f3f4)[\U000e0020-\U000e007e]{2,6}\U000e007f")  # black flag, region, end: England, Scotland, Wales
_HIDDEN = re.compile("[\u200b\u200c\u200d\u2060-\u2064\ufeff]{4,}|[\ufe00-\ufe0f\U000e0100-\U000e01ef]{3,}|[\u202d\u202e]")
_CONTROL = re.compile(
    r"<\|[\w ]{2,40}\|>|<\uff5c[\w\u2581 ]{2,40}\uff5c>|<(?:start"
    r"|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>|\[(?:gMASK|sMASK|/?TOOL_CALLS)\]"
)


def _all(pattern: re.Pattern[str]) -> Callable[[str], Places]:
    return lambda text: (match.span() for match in pattern.finditer(text))


def _high_entropy(text: str) -> Places:
    for match in _NAMED.finditer(text):
        value = match.group(1)
        mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
        if mixed and entropy(value) >= _ENTROPY:
            yield match.span(1)


def entropy(text: str) -> float:
    """Bits per character, from the text's own character frequencies (Shannon)."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _emails(text: str) -> Places:
    return (match.span() for match in _EMAIL.finditer(text) if not _EXAMPLE.search(match.group()))


def _phones(text: str) -> Places:
    return (
        m.span() for m in _PHONE.finditer(text) if 9 <= sum(map(str.isdigit, m.group())) <= 15 and "555-01" not in m.group()
    )


def _ibans(text: str) -> Places:
    return (match.span() for match in _IBAN.finditer(text) if is_iban(match.group()))


def is_iban(text: str) -> bool:
    """Whether the ISO 13616 checksum is correct: first four characters moved to the end, letters as 10 to 35, 1 modulo 97."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _cards(text: str) -> Places:
    return (match.span() for match in _CARD.finditer(text) if is_card(match.group()))


def is_card(text: str) -> bool:
    """Whether there are 13 to 19 digits and their Luhn sum ends in 0 (ISO/IEC 7812-1, annex B)."""
    digits = [int(character) for character in text if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 3:
        return False
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _injections(text: str) -> Places:
    if injection_score(text) >= 1:
        yield 0, len(text)


def _hidden_tags(text: str) -> Places:
    flags = {match.start() for match in _FLAG.finditer(text)}
    return (match.span() for match in _TAGS.finditer(text) if match.start() not in flags)


_CHECKS: dict[str, Callable[[str], Places]] = {
    "hidden-tags": _hidden_tags,
    "hidden-unicode": _all(_HIDDEN),
    "secret": _all(_SECRET),
    "high-entropy": _high_entropy,
    "email": _emails,
    "phone": _phones,
    "iban": _ibans,
    "card": _cards,
    "injection": _injections,
    "control-token": _all(_CONTROL),
}
#: Rules applied to the raw text, because cleaning removes some of what they look for.
BEFORE_CLEANING = ("hidden-tags", "hidden-unicode")


def screen(
    messages: Sequence[Message], actions: dict[str, Action], rules: Sequence[str]
) -> tuple[list[Message], list[Finding]]:
    """The messages, matches of `fix` rules replaced by a placeholder such as `[EMAIL]`, and the findings of these rules."""
    screened, findings = [dict(message) for message in messages], []
    for rule in rules:
        if (action := actions.get(rule)) is None:
            continue
        counts: dict[int, int] = {}
        for turn, text in list(texts(screened)):
            found = list(_CHECKS[rule](text)) if _worth_looking(rule, text) else []
            if found:
                counts[turn] = len(found)
                if action == "fix":
                    screened[turn - 1]["content"] = _replaced(text, found, f"[{rule.upper()}]")
        if counts:
            findings.append(Finding(rule, action, places(counts)))
    return screened, findings


def _worth_looking(rule: str, text: str) -> bool:
    if rule in BEFORE_CLEANING:
        return not text.isascii()
    if rule in _NUMBERS:
        return _DIGITS.search(text) is not None
    lower = text.lower()
    return rule not in _STEMS or any(stem in lower for stem in _STEMS[rule])


def _replaced(text: str, found: Sequence[tuple[int, int]], placeholder: str) -> str:
    for start, end in reversed(found):
        text = text[:start] + placeholder + text[end:]
    return text


SCREENED = tuple(rule for rule in _CHECKS if rule not in BEFORE_CLEANING)
