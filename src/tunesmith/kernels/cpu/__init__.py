"""Custom kernels for CPUs, in C++: compiled on first use for the processor that runs them, and cached.

PyTorch's wheels target every x86-64 processor; these kernels are small enough to compile for the local one in a few seconds.
Without a compiler, or if a kernel's results do not match PyTorch's operators, PyTorch's are used: the same result up to
rounding, in more time. `unsupported_reason` gives the reason.
"""

from __future__ import annotations

from tunesmith.kernels.cpu import adapters, blocks, cross_entropy, tree_attention

#: Each has its own `unsupported_reason`.
KERNELS = (tree_attention, adapters, blocks, cross_entropy)


def unsupported_reason() -> str | None:
    """Why a kernel is unsupported on this machine (the reason of the first such kernel), or None."""
    reasons = (module.unsupported_reason() for module in KERNELS)
    return next((reason for reason in reasons if reason is not None), None)
