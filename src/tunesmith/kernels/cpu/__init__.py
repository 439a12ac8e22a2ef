"""Custom kernels for CPUs, in C++: compiled where they are used, for the processor that runs them, and kept.

PyTorch's wheels serve every x86-64 processor; what is here is small enough to be compiled in a few seconds for the one at hand.
Without a compiler, or where a kernel does not give what PyTorch's operators give, PyTorch's are taken: the same result to
rounding, more time. `unsupported_reason` tells which.
"""

from __future__ import annotations

from tunesmith.kernels.cpu import adapters, blocks, cross_entropy, products, tree_attention

#: Each with a `unsupported_reason` of its own.
KERNELS = (tree_attention, products, adapters, blocks, cross_entropy)


def unsupported_reason() -> str | None:
    """Why a kernel cannot be had on this machine (the first one that cannot), or None."""
    reasons = (module.unsupported_reason() for module in KERNELS)
    return next((reason for reason in reasons if reason is not None), None)
