"""Cleans text: transmission damage is repaired, everything with a meaning is kept.

A text that is JSON is never changed. Within other texts no rule changes fenced and inline code, or maths between dollars or
LaTeX brackets. Invisible characters are kept where they join: in emoji sequences, and in scripts that need them to shape
letters (Arabic and related scripts, the scripts of India and South-East Asia, Mongolian). Direction marks are kept in text
with right-to-left letters, break marks in scripts without spaces. No-break spaces, compatibility forms (x², ﬁ) and tabs are
kept.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import ftfy
from ftfy.badness import is_bad

from tunesmith.quality.findings import Finding, Message, places, texts
from tunesmith.quality.markup import html_to_text, is_about_html
from tunesmith.recipe import CleanSection

#: Fenced blocks (an unclosed one to the end), inline code, maths of up to 1,000 characters; no blanks just inside the dollars.
_KEPT = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*(?P=fence)[^\n]*$|\Z)"
    r"|(?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)"
    r"|\$\$.{1,1000}?\$\$|\\\[.{1,1000}?\\\]|\\\(.{1,1000}?\\\)|\$(?=\S)[^$\n]{1,1000}?(?<=\S)\$(?!\d)",
    re.DOTALL | re.MULTILINE,
)
_MAY_KEEP = re.compile(r"[`$]|~~~|\\[(\[]")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE_END = re.compile(r"[\x0b\x0c]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_JOINERS, _DIRECTIONS, _BREAK = "\u200c\u200d", "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "\u200b"
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
# Scripts in which a joiner changes letter shapes, and the emoji blocks with their variation selectors and skin tones.
_JOINED = re.compile(
    r"[\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1a00-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc"
    r"\U00010d00-\U00011fff\u00a9\u00ae\u203c-\u2bff\u3030-\u3299\ufe0e\ufe0f\U0001f000-\U0001faff]"
)
_BROKEN = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\u1950-\u19ff\ua9e0-\uaa7f]")
_BLANK_END = re.compile(r"(?<=[^ \t\n])(?:[ \t]|[ \t]{3,})(?=\n)|(?<=\n)[ \t]+(?=\n)")  # two blanks are a Markdown line break
_FOREIGN_END = re.compile(r"\r\n?|[\u2028\u2029\x85]")
_BLANK_START = re.compile(r"(?:[ \t]*\n)+")
_BLANK_LINES = re.compile(r"\n{4,}")

_Step = Callable[[str], tuple[str, int]]


def clean(messages: Sequence[Message], settings: CleanSection) -> tuple[list[Message], list[Finding]]:
    """The cleaned messages, and a finding with action `fix` for each rule that changed something, with counts per turn."""
    changed: dict[str, Counter[int]] = {}
    cleaned = [dict(message) for message in messages]
    steps = [rule for rule in _STEPS if getattr(settings, rule) and not (rule == "html" and _about_html(messages))]
    for number, text in texts(messages):
        if is_json(text):
            continue
        mended = text
        for rule in steps:
            mended, count = _STEPS[rule](mended)
            if count:
                changed.setdefault(rule, Counter())[number] += count
        cleaned[number - 1]["content"] = mended
    return cleaned, [Finding(f"clean-{rule.replace('_', '-')}", "fix", places(counts)) for rule, counts in changed.items()]


def _about_html(messages: Sequence[Message]) -> bool:
    """Whether a row that may contain markup talks about HTML in any turn."""
    contents = [text for _, text in texts(messages)]
    return any(text.lstrip()[:1] == "<" for text in contents) and any(is_about_html(text) for text in contents)


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _prose(text: str, change: _Step) -> tuple[str, int]:
    """Applies `change` to everything except code and maths."""
    if not _MAY_KEEP.search(text):
        return change(text)
    parts, count, position = [], 0, 0
    for kept in _KEPT.finditer(text):
        part, changes = change(text[position : kept.start()])
        parts += [part, kept.group()]
        count, position = count + changes, kept.end()
    part, changes = change(text[position:])
    return "".join([*parts, part]), count + changes


def _html(text: str) -> tuple[str, int]:
    plain = html_to_text(text)
    return (text, 0) if plain is None else (plain, 1)


def _mojibake(text: str) -> tuple[str, int]:
    if text.isascii() or not is_bad(text):
        return text, 0

    def repair(part: str) -> tuple[str, int]:
        fixed = ftfy.fix_encoding(part)
        return fixed, int(fixed != part)

    return _prose(text, repair)


def _unicode(text: str) -> tuple[str, int]:
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text, 0

    def compose(part: str) -> tuple[str, int]:
        composed = unicodedata.normalize("NFC", part)
        return composed, int(composed != part)

    return _prose(text, compose)


def _control(text: str) -> tuple[str, int]:
    if not (_CONTROL.search(text) or _LINE_END.search(text)):
        return text, 0

    def remove(part: str) -> tuple[str, int]:
        part, colours = _COLOUR.subn("", part)
        part, ends = _LINE_END.subn("\n", part)
        part, others = _CONTROL.subn("", part)
        return part, colours + ends + others

    return _prose(text, remove)


def _zero_width(text: str) -> tuple[str, int]:
    if not _INVISIBLE.search(text):
        return text, 0
    right_to_left = _RIGHT_TO_LEFT.search(text) is not None

    def remove(part: str) -> tuple[str, int]:
        removed = 0

        def decide(match: re.Match[str]) -> str:
            nonlocal removed
            if _has_use(match, right_to_left):
                return match.group()
            removed += 1
            return ""

        return _INVISIBLE.sub(decide, part), removed

    return _prose(text, remove)


def _has_use(match: re.Match[str], right_to_left: bool) -> bool:
    """Whether an invisible character has an effect at its position."""
    character = match.group()
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    if character in _DIRECTIONS:
        return right_to_left
    if character in _JOINERS:
        return bool(_JOINED.match(before) or _JOINED.match(after))
    return character == _BREAK and bool(_BROKEN.match(before) or _BROKEN.match(after))


def _whitespace(text: str) -> tuple[str, int]:
    def tidy(part: str) -> tuple[str, int]:
        part, ends = _FOREIGN_END.subn("\n", part)
        part, blanks = _BLANK_END.subn("", part) if " \n" in part or "\t\n" in part else (part, 0)
        part, lines = _BLANK_LINES.subn("\n\n\n", part)
        return part, ends + blanks + lines

    text, count = _prose(text, tidy)
    start = _BLANK_START.match(text)
    stripped = text[start.end() if start else 0 :].rstrip()
    return stripped, count + int(stripped != text)


#: The order matters: mojibake is detected by control characters, so they are removed after it.
_STEPS: dict[str, _Step] = {
    "mojibake": _mojibake,
    "html": _html,
    "control": _control,
    "zero_width": _zero_width,
    "unicode": _unicode,
    "whitespace": _whitespace,
}
