"""The contents of a safetensors file by its header alone; no tensor is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype in the format's spelling (BF16) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(path: Path) -> dict[str, Stored]:
    """Dtype and shape of each tensor by name. Raises ValueError with the reason for a file that cannot be opened.

    The file begins with the length of its JSON header (8 bytes, little endian) and the header. The format's own parser checks
    that shapes, dtypes and offsets are valid, without gaps or overlaps.
    """
    from safetensors import SafetensorError, safe_open

    entries = _json_header(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"not a valid safetensors file: {error}") from error
    return {name: Stored(str(each["dtype"]), tuple(each["shape"])) for name, each in entries.items() if name != "__metadata__"}


def _json_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError("not a complete safetensors file")
        try:
            entries = json.loads(handle.read(length), object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("the safetensors header is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"the safetensors header cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError("the safetensors header is not a JSON object")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate names: readers differ in which duplicate they use."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("it has a duplicate name")
    return made
