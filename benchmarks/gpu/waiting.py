"""Imports what takes seconds and leaves the device alone, waits for a line on standard input, and then does what cell.py does.

run.py starts the next case's process this way while a case is measured. What it imports creates no CUDA context, whose memory
would be counted as the other case's; bitsandbytes would.
"""

from __future__ import annotations

import sys
from importlib import import_module

SLOW = ("torch", "datasets", "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama")


def main() -> None:
    """Import, wait, measure."""
    for name in SLOW:
        import_module(name)
    if sys.stdin.readline():
        import_module("cell").main()


if __name__ == "__main__":
    main()
