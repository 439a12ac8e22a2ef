"""Compiles a C++ source of this folder to a shared library, once per processor and compiler, and loads it.

The library is kept in the cache folder; its name is a hash of everything it depends on. It does not link an OpenMP library:
the symbols come from the one that PyTorch has loaded, so both use the same threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tunesmith.io.cache import cache_folder

#: Setting this variable to 0 disables the kernels.
SWITCH = "TUNESMITH_NATIVE"

#: Types of tensors with data; others, such as the plan's FakeTensors, have none.
REAL = (torch.Tensor, torch.nn.Parameter)

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-exceptions", "-fno-rtti")
_SECONDS = 300  # more than any compiler needs; a compiler that hangs is stopped


class NoKernelError(RuntimeError):
    """A kernel is unsupported on this machine; the message is the reason."""


@cache
def library(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp. Raises NoKernelError if it cannot be compiled or loaded."""
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except OSError as error:  # the cache folder, the compiler, or a library without the symbols it needs
        raise NoKernelError(f"{type(error).__name__}: {error}") from error


def unsupported_reason(name: str, gives_what_it_should: Callable[[], bool]) -> str | None:
    """Why the kernels of `name`.cpp are unsupported here, or None; compiles and tests them."""
    try:
        library(name)
    except NoKernelError as error:
        return str(error)
    return None if gives_what_it_should() else "the compiled kernels' results do not match the reference formulas"


def call(name: str, function: str, *values: Any) -> int:
    """The return value of a function of `name`.cpp.

    Tensors are passed as pointers, integers as int64, floats as float32, anything else as it is; the number of threads
    comes last.
    """
    made: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            made.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            made.append(ctypes.c_float(value))
        else:
            made.append(ctypes.c_int64(value) if isinstance(value, int) else value)
    returned: int = getattr(library(name), function)(*made, ctypes.c_int(torch.get_num_threads()))
    return returned


def plain(*tensors: torch.Tensor) -> bool:
    """Whether these are real tensors in CPU memory, and not FakeTensors, which the plan uses."""
    return all(type(each) in REAL and each.is_cpu for each in tensors)


def computes(kernel: Any, *tensors: torch.Tensor) -> bool:
    """Whether a module's kernels support these tensors here: plain tensors of one dtype, which is among its DTYPES."""
    if not plain(*tensors):
        return False
    dtypes = {each.dtype for each in tensors}
    return len(dtypes) == 1 and dtypes <= set(kernel.DTYPES) and kernel.unsupported_reason() is None


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last dimension, as kernels require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@contextmanager
def own_graph() -> Iterator[None]:
    """A context to compute gradients regardless of the caller: in inference mode, or in a block that is recomputed.

    Gradient checkpointing counts the tensors saved for the backward pass; those of a kernel's test must not be counted.
    """
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    ):
        yield


def _compiled(source: Path) -> Path:
    """The library's file; compiled if it does not exist yet, and created atomically."""
    if os.environ.get(SWITCH) == "0":
        raise NoKernelError(f"{SWITCH} is 0")
    if sys.platform != "linux":
        raise NoKernelError(f"kernels are compiled only on Linux, and this is {sys.platform}")
    compiler = _compiler()
    text = b"".join(each.read_bytes() for each in (source, *sorted(source.parent.glob("*.h"))))
    digest = hashlib.sha256(
        b"\0".join([text, _version(compiler).encode(), " ".join(_FLAGS).encode(), _processor()])
    ).hexdigest()
    folder = cache_folder() / "native"
    target = folder / f"{source.stem}-{digest[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
            _run([compiler, *_FLAGS, "-c", str(source), "-o", str(compiled)])
            _run([compiler, "-shared", str(compiled), "-o", str(linked)])
            linked.replace(target)
    for path in (folder, target):
        found = path.stat()
        if found.st_uid not in {os.getuid(), 0} or found.st_mode & stat.S_IWOTH:
            raise NoKernelError(f"{path} can be written by others, and its content would be executed")
    return target


def _compiler() -> str:
    """`$CXX`, else g++ or c++, the order in which torch.compile looks for a compiler."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoKernelError("there is no C++ compiler (g++)")


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _processor() -> bytes:
    """What `-march=native` depends on: the processor's model and its instruction sets."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    keys = (b"model", b"cpu family", b"stepping", b"flags", b"features", b"cpu implementer", b"cpu part")
    return b"\n".join(line for line in lines if line.lower().startswith(keys))


def _run(command: list[str]) -> str:
    """A command's output. Raises NoKernelError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise NoKernelError(f"{command[0]} did not finish within {_SECONDS} seconds") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()
        raise NoKernelError(f"{command[0]} failed: {last[0] if last else f'exit code {error.returncode}'}") from None
    return done.stdout
