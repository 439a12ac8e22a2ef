"""Custom kernels for GPUs, in Triton: one pass over memory where PyTorch's operators make several.

Triton comes with PyTorch's builds for GPUs, and compiles each kernel for the card at hand in about a second. Where it cannot,
or where a kernel does not give what PyTorch's operators give, those are taken: the same result to rounding, more time.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from tunesmith.errors import first_line
from tunesmith.kernels.cpu.library import REAL, SWITCH

#: What the kernels read and write; they compute in float32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot be had on the device, or None; they are compiled, and tried on small tensors, the first time."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if device.type != "cuda":
        return f"they are for GPUs, and this is {device.type}"
    try:
        return _tried(device)
    except RuntimeError as error:
        return str(error)


def _tried(device: torch.device) -> str | None:
    """What is wrong with the kernels' results, or None. Raises RuntimeError where Triton does not work."""
    try:
        from tunesmith.kernels.triton import trial

        return trial.wrong(device)
    except Exception as error:  # what Triton raises is of no common kind
        raise RuntimeError(f"Triton does not work here: {first_line(error)}") from error


def computes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels compute with these: on a GPU, of dtypes they know, none that stands for others, as the plan's do."""
    return (
        tensors[0].is_cuda
        and all(type(each) in REAL and each.dtype in DTYPES for each in tensors)
        and unsupported_reason(tensors[0].device) is None
    )
