"""What a safetensors file says it holds: its header alone, no tensor is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its dtype as the format spells it (BF16) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(path: Path) -> dict[str, Stored]:
    """Name and shape of each tensor. Raises ValueError, which says what is wrong, for a file that cannot be opened.

    The file begins with the length of its JSON header (8 bytes, little endian) and the header. That shapes, dtypes and offsets
    are sound, without a gap or an overlap, is left to the format's own parser.
    """
    from safetensors import SafetensorError, safe_open

    entries = _json_header(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"not a sound safetensors file: {error}") from error
    return {name: Stored(str(each["dtype"]), tuple(each["shape"])) for name, each in entries.items() if name != "__metadata__"}


def _json_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError("not a whole safetensors file")
        try:
            entries = json.loads(handle.read(length), object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("the safetensors header is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"the safetensors header cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError("the safetensors header is no JSON object")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice, of which readers take another one each."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands in it twice")
    return made
