"""Custom kernels: `cpu` (C++), `triton` and `liger` (GPUs), and `dispatch`: which of them computes an operator."""
