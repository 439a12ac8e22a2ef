"""Rules on the answers of one row: defects that a careful reviewer would not want a model to learn from.

All are heuristics. Refusals and cut-offs are detected only in English (cut-offs by punctuation in other languages too).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from tunesmith.quality.clean import is_json
from tunesmith.quality.findings import Message, texts
from tunesmith.quality.words import words

_ECHO_WORDS = 5  # a shorter question may be its own correct answer
_NOT = r"(?:can['\u2019]?t|cannot|am unable to|am not able to|won['\u2019]?t|will not|do(?: not|n['\u2019]?t) have)"
_REFUSAL = re.compile(
    r"\W*(?:(?:i['\u2019]?m|i am) (?:very |truly |really )?sorry,? but|i apologi[sz]e,? but"
    rf"|(?:sorry,? (?:but )?)?i {_NOT} (?:help|assist|fulfil|comply|provide|answer|do that|create|generate|support|engage)"
    rf"|(?:unfortunately,? )?as an? (?:ai|artificial|(?:large )?language)\b[^.\n]{{0,60}}\bi {_NOT}\b)",
    re.IGNORECASE,
)
_STOPS_OPEN = re.compile(
    r"(?:[,;:(\[{\u2013\u2014-]|\b(?:and|or|but|the|a|an|of|to|in|with|for|by|from|because|which|that|is|are|was|were))\Z",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
_TAIL = 40  # characters at the end that are checked for a cut-off
_LONG = 200  # characters from which an answer without final punctuation counts as cut off
_ENDS = re.compile(
    r"[.!?\u2026\u3002\uff01\uff1f\u0964\u061f\u06d4\u0589\u17d4)\]}\"'\u201d\u2019\u00bb\u300d*_`|>:~=$%]\Z|\d\Z"
)
_PART = re.compile(r"\n+|(?<=[.!?])\s+")
_LINE_WORDS = 3
_LIST_LINE = re.compile(r"\s*(?:[-*+\u2022|#>]|\d+[.)]|\w+:)")


def empty_answer(messages: Sequence[Message]) -> str | None:
    """Assistant turns without visible text and without a tool call."""
    answers = [(turn, text) for turn, text in texts(messages, "assistant") if not messages[turn - 1].get("tool_calls")]
    empty = [turn for turn, text in answers if not any(_visible(character) for character in text)]
    return f"turn {', '.join(map(str, empty))}" if empty else None


def _visible(character: str) -> bool:
    return not character.isspace() and (character.isprintable() or ord(character) >= 0xE000)


def one_word_answer(messages: Sequence[Message]) -> str | None:
    """One-word answers."""
    short = [turn for turn, text in texts(messages, "assistant") if len(text.split()) == 1 and len(words(text)) <= 1]
    return f"turn {', '.join(map(str, short))}" if short else None


def answer_repeats_prompt(messages: Sequence[Message]) -> str | None:
    """Answers that repeat the turn before them, ignoring punctuation and case."""
    for (_, question), (turn, answer) in _exchanges(messages):
        if len(answer) > 2 * len(question) or len(question) > 2 * len(answer):
            continue
        asked = words(question)
        if len(asked) >= _ECHO_WORDS and words(answer) == asked:
            return f"turn {turn}, {len(asked)} words"
    return None


def _exchanges(messages: Sequence[Message]) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    turns = list(texts(messages, "user", "assistant"))
    for before, after in pairwise(turns):
        if messages[before[0] - 1]["role"] == "user" and messages[after[0] - 1]["role"] == "assistant":
            yield before, after


def cut_off_answer(messages: Sequence[Message]) -> str | None:
    """The last answer, if it ends in a code block or with a word that needs another, or is long without final punctuation."""
    found = None
    for turn, text in texts(messages, "assistant"):
        found = _cut_off(text.rstrip(), turn)
    return found


def _cut_off(text: str, turn: int) -> str | None:
    if not text or is_json(text):
        return None
    fences = len(_FENCE.findall(text)) if "```" in text or "~~~" in text else 0
    if fences % 2:
        return f"turn {turn}, inside a code block"
    if text[0] in "{[" and not fences:
        return (
            f"turn {turn}, inside a bracket" if text.count("{") > text.count("}") or text.count("[") > text.count("]") else None
        )
    if _STOPS_OPEN.search(text[-_TAIL:]) and len(words(text)) >= _ECHO_WORDS:
        return f"turn {turn}, in mid-sentence"
    last = text.rpartition("\n")[2]
    prose = not _LIST_LINE.match(last) and len(last) >= _LONG and not fences
    if prose and not _ENDS.search(text) and text[-1].isalpha() and re.search(r"[.!?]\s", last):
        return f"turn {turn}, without an end"
    return None


def refusal(messages: Sequence[Message]) -> str | None:
    """Answers that begin with a refusal."""
    refused = [turn for turn, text in texts(messages, "assistant") if _REFUSAL.match(text)]
    return f"turn {', '.join(map(str, refused))}" if refused else None


def repetition(messages: Sequence[Message]) -> str | None:
    """Answers half of which is one line or sentence repeated four times or more, or whose runs of words mostly repeat."""
    for turn, text in texts(messages, "assistant"):
        if is_json(text) or "```" in text:
            continue
        parts = Counter(part.strip() for part in _PART.split(text))
        often = [times for part, times in parts.items() if times >= 4 and len(words(part)) >= _LINE_WORDS]
        if often and 2 * max(often) >= parts.total():
            return f"turn {turn}, one sentence {max(often)} times"
        each = words(text)
        if 2 * len(set(each)) > len(each):
            continue  # half of the words are new: no run can repeat that often
        runs = [tuple(each[i : i + 4]) for i in range(len(each) - 3)]
        if len(runs) >= 40 and 3 * len(set(runs)) < len(runs):
            return f"turn {turn}, {len(set(runs))} of {len(runs)} runs of four words differ"
    return None


def non_alternating_roles(messages: Sequence[Message]) -> str | None:
    """Two consecutive turns of one role, a late system turn, or an assistant turn first. Tool turns may repeat."""
    roles = [str(message.get("role")) for message in messages]
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False), start=1):
        if role == before and role != "tool":
            return f"turn {number}, {role} again"
        if role == "system" and number > 1:
            return f"turn {number}, a late system turn"
        if role == "assistant" and before in (None, "system"):
            return f"turn {number}, an answer to nothing"
    return None


def merged_turns(messages: Sequence[Message]) -> list[Message]:
    """Consecutive turns of one role merged, separated by a blank line; turns with more than text stay separate."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else {}
        plain = set(message) == set(last) == {"role", "content"} and isinstance(message["content"], str)
        if plain and last["role"] == message["role"] != "tool" and isinstance(last["content"], str):
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(dict(message))
    return merged


#: Quality rules for a single row; each returns what it found, or None.
ROW_RULES: dict[str, Callable[[Sequence[Message]], str | None]] = {
    "empty-answer": empty_answer,
    "one-word-answer": one_word_answer,
    "answer-repeats-prompt": answer_repeats_prompt,
    "cut-off-answer": cut_off_answer,
    "refusal": refusal,
    "repetition": repetition,
    "non-alternating-roles": non_alternating_roles,
}
