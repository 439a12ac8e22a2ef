"""Kernels of our own for CPUs, in C++: compiled where they are used, for the processor that runs them, and kept.

PyTorch's wheels serve every x86-64 processor; what is here is small enough to be compiled in two seconds for the one at hand.
Without a compiler, or where a kernel does not give what PyTorch's gives, PyTorch's own are taken: the same result, more time.
"""
