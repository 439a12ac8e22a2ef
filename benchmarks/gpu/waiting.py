"""Imports slow modules without touching the device, waits for a line on standard input, then runs cell.py.

run.py starts the process of the next case this way while a case is measured. These imports create no CUDA context, whose memory
would be counted for the other case; bitsandbytes would create one.
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
