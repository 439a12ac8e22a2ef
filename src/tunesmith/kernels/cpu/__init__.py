"""Custom kernels for CPUs, in C++: compiled where they are used, for the processor that runs them, and kept.

PyTorch's wheels serve every x86-64 processor; what is here is small enough to be compiled in a few seconds for the one at hand.
Without a compiler, or where a kernel does not give what PyTorch's operators give, PyTorch's are taken: the same result to
rounding, more time. `reason_against` tells which.
"""

from __future__ import annotations

from tunesmith.kernels.cpu import adapters, blocks, cross_entropy, products, tree_attention

#: Each with a `reason_against` of its own.
KERNELS = (tree_attention, products, adapters, blocks, cross_entropy)


def reason_against() -> str | None:
    """Why a kernel cannot be had on this machine (the first one that cannot), or None."""
    reasons = (module.reason_against() for module in KERNELS)
    return next((reason for reason in reasons if reason is not None), None)
