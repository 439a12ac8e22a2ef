"""Words of a text and hashes of word runs, used to detect near-duplicates and overlap with benchmarks."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from tunesmith.quality.findings import Message, texts

# Scripts without spaces are split by character (CJK, kana, Thai, Lao, Khmer, Myanmar), others by word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_SEGMENT = re.compile(r"\n+|(?<=[.!?:])\s+|(?<=[\u3002\uff01\uff1f\uff1a])")
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it is lossless


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.crc32(data, 0x5BD1E995)


def words(text: str) -> list[str]:
    """Lower-case words; in scripts without spaces each character is a word."""
    return _WORD.findall(text.lower())


def run_hashes(text_words: Sequence[str], size: int) -> np.ndarray:
    """A 64-bit hash (uint64) of each run of `size` words, in order; empty if there are fewer words."""
    if len(text_words) < size:
        return np.empty(0, np.uint64)
    each = np.fromiter((_word_hash(word) for word in text_words), np.uint64, len(text_words))
    count = len(each) - size + 1
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total = (total ^ each[offset : offset + count]) * _PRIME
        total ^= total >> np.uint64(29)
    return total


def segments(text: str) -> list[str]:
    """The text split at line ends and after sentences."""
    return [part for part in _SEGMENT.split(text) if part and not part.isspace()]


def common_segments(rows: Iterable[Sequence[Message]], share: float = 0.02, at_least: int = 20) -> frozenset[str]:
    """Lines and sentences in at least this share of the rows, and in at least this many: instructions, boilerplate.

    A first pass over a few thousand rows is enough. Without it, rows that share a long instruction look alike.
    """
    counts: dict[str, int] = {}
    total = 0
    for messages in rows:
        total += 1
        for part in {part for _, text in texts(messages) for part in segments(text)}:
            counts[part] = counts.get(part, 0) + 1
    limit = max(at_least, share * total)
    return frozenset(part for part, count in counts.items() if count >= limit)


def row_text(messages: Sequence[Message], common: frozenset[str] = frozenset()) -> str:
    """The text that distinguishes a row: all turns except system turns, without segments `common` to many rows.

    Common segments of answers are kept: they are what the row teaches.
    """
    parts = []
    for number, text in texts(messages):
        role = messages[number - 1].get("role")
        if role == "system":
            continue
        parts.append(text if role == "assistant" or not common else "\n".join(s for s in segments(text) if s not in common))
    return "\n".join(parts)
