"""Custom kernels for GPUs, in Triton: one pass over memory where PyTorch's operators make several.

Off unless TUNESMITH_TRITON is 1: no measurement has shown yet that they train faster than Liger's kernels, bitsandbytes' and
PyTorch's operators. Triton comes with PyTorch's builds for GPUs, and compiles each kernel for the local card in about a second.
If it cannot, or if a kernel's results do not match PyTorch's operators, those are used: the same result up to rounding.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from tunesmith.errors import first_line
from tunesmith.kernels.cpu.library import REAL

#: Setting this variable to 1 enables the kernels.
SWITCH = "TUNESMITH_TRITON"

#: What the kernels read and write; they compute in float32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def asked() -> bool:
    """Whether the environment enables the kernels."""
    return os.environ.get(SWITCH) == "1"


@cache
def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels are unsupported on the device, or None; the first call compiles them and tests them on small tensors."""
    if device.type != "cuda":
        return f"they are for GPUs, and this is {device.type}"
    if not asked():
        return f"{SWITCH} is not 1"
    try:
        return _tried(device)
    except RuntimeError as error:
        return str(error)


def _tried(device: torch.device) -> str | None:
    """What is wrong with the kernels' results, or None. Raises RuntimeError if Triton does not work."""
    try:
        from tunesmith.kernels.triton import trial

        return trial.wrong(device)
    except Exception as error:  # Triton raises exceptions of many unrelated types
        raise RuntimeError(f"Triton does not work here: {first_line(error)}") from error


def computes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support these tensors: on a GPU, of supported dtypes, and no FakeTensors, which the plan uses."""
    return (
        tensors[0].is_cuda
        and all(type(each) in REAL and each.dtype in DTYPES for each in tensors)
        and unsupported_reason(tensors[0].device) is None
    )
