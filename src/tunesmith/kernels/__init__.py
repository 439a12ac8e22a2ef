"""Custom kernels: `cpu` (C++), `triton` and `liger` (GPUs), and `dispatch`, which selects a kernel for an operator."""
