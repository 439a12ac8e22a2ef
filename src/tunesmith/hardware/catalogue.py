"""The devices that plans are made for: a catalogue of GPUs and this machine, without importing torch."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import HardwareError, Problem
from tunesmith.hardware import DtypeName, Hardware, cpu_compute_dtype, cpu_name, usable_cores

GIB = 2**30

#: Environment variable with the path of a file of cards to add to the built-in ones.
VARIABLE = "TUNESMITH_GPUS"

_WHY = "memory, time and money are computed from the card"


@dataclass(frozen=True)
class Device:
    """The training hardware: `count` equal devices. FLOP/s and bytes/s are peaks; `price` is US dollars per hour per device.

    `product_bytes` is the memory that bfloat16 GEMMs keep beyond their tensors: compiled code, weights packed for AMX.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    count: int
    memory_bytes: int
    flops: Mapping[str, float]
    bandwidth: float
    price: float
    note: str | None = None
    product_bytes: int = 0

    @property
    def compute_dtype(self) -> DtypeName:
        """The dtype that matmuls should run in."""
        return "bfloat16" if self.flops["bfloat16"] > self.flops["float32"] else "float32"

    def as_hardware(self) -> Hardware:
        """The same device as a `Hardware` object, as training uses it."""
        dtype = self.compute_dtype
        reason = f"{self.name} multiplies {dtype} fastest"
        gpu = self.kind == "cuda"
        memory = self.memory_bytes
        return Hardware(self.kind, self.name, 1, memory, self.count if gpu else 0, memory if gpu else None, dtype, reason)


def read_gpus(extra: Path | None = None) -> dict[str, Device]:
    """The built-in cards by name; cards from `extra`, or from the file that TUNESMITH_GPUS names, are added or override them.

    Raises HardwareError for a file that cannot be read, or that has a missing or non-positive figure.
    """
    gpus = _parse(files("tunesmith.hardware").joinpath("data/gpus.toml").read_text(encoding="utf-8"), "gpus.toml")
    named = extra or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        try:
            text = named.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = f"check the path; without --gpus and {VARIABLE} the built-in cards are used"
            raise HardwareError(Problem("TS702", f"cannot read the cards: {error}", str(named), _WHY, fix)) from error
        gpus |= _parse(text, str(named))
    return gpus


def _parse(text: str, source: str) -> dict[str, Device]:
    line = '"My card" = { memory_gib = 24, bfloat16 = 70, float32 = 35, bandwidth = 900, price = 1 }'
    fix = f"write [gpus], followed by lines such as {line}"
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HardwareError(Problem("TS702", f"not valid TOML: {error}", source, _WHY, fix)) from error
    cards = values.get("gpus")
    if not isinstance(cards, dict):
        raise HardwareError(Problem("TS702", "there is no table [gpus]", source, _WHY, fix))
    return {name: _card(name, card, source) for name, card in cards.items()}


def _card(name: str, card: Any, source: str) -> Device:
    def figure(key: str, *, least: float = 1e-9) -> float:
        value = card.get(key) if isinstance(card, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            what = f"{name}: {key} = {value!r} is not a number of at least {least:g}"
            raise HardwareError(Problem("TS702", what, source, _WHY, "correct that figure"))
        return float(value)

    flops = {"bfloat16": figure("bfloat16", least=0) * 1e12, "float32": figure("float32") * 1e12}
    memory = int(figure("memory_gib") * GIB)
    return Device("cuda", name, 1, memory, flops, figure("bandwidth") * 1e9, figure("price", least=0))


def find_device(text: str, gpus: Mapping[str, Device]) -> Device:
    """The device that `text` names: a card (`H100`), a size (`24GB`), several of either (`8xH100`), or `cpu`.

    A size means the slowest of the smallest catalogue cards with at least that memory, so that time is not underestimated.
    """
    if text.strip().lower() == "cpu":
        return this_cpu()
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(.+?)\s*", text)
    if match is None or match[1] == "0":
        raise HardwareError(Problem("TS701", f"{text!r} is not a hardware name", "--gpu", _WHY, "write 24GB, H100 or 8xH100"))
    count, name = int(match[1] or 1), match[2]
    size = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(?:G|GB|GiB)", name, re.IGNORECASE)
    if size is not None:
        return replace(_of_size(float(size[1]), gpus), count=count)
    by_key = {_key(known): known for known in gpus}
    key = _key(name)
    found = by_key.get(key)
    if found is None:
        near = difflib.get_close_matches(key, list(by_key), 3, 0.5) or [k for k in by_key if key and key in k]
        names = ", ".join(by_key[k] for k in near) or ", ".join(gpus)
        fix = f"nearest: {names}; or give a size such as 24GB, or add the card to a file for --gpus"
        raise HardwareError(Problem("TS701", f"unknown GPU {name[:60]!r}", "--gpu", _WHY, fix))
    return replace(gpus[found], count=count)


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|graphics|sxm\d?|hbm\w*|[^a-z0-9]", "", name.lower())


def _of_size(gib: float, gpus: Mapping[str, Device]) -> Device:
    if not 1 <= gib <= 4096:
        what = f"{gib:g} GB is not the memory of a GPU"
        raise HardwareError(Problem("TS701", what, "--gpu", _WHY, "give the memory of one GPU, such as 24GB"))
    fitting = [gpu for gpu in gpus.values() if gpu.memory_bytes >= gib * GIB and gpu.compute_dtype == "bfloat16"]
    if not fitting:
        fitting = [max(gpus.values(), key=lambda gpu: gpu.memory_bytes)]
    nearest = min(gpu.memory_bytes for gpu in fitting)
    like = min((gpu for gpu in fitting if gpu.memory_bytes == nearest), key=lambda gpu: gpu.flops["bfloat16"])
    note = f"time and cost are those of {like.name}, the slowest card of that size; name your card for its own figures"
    return replace(like, name=f"{gib:g} GB GPU", memory_bytes=int(gib * GIB), note=note)


def this_device(gpus: Mapping[str, Device]) -> Device:
    """Return the device of this machine: its NVIDIA GPUs as listed by nvidia-smi, else its CPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return this_cpu()
    lines = [line.rsplit(",", 1) for line in listed.splitlines() if "," in line]
    if not lines:
        return this_cpu()
    name, megabytes = lines[0][0].strip(), lines[0][1].strip()
    return replace(named_by_driver(name, int(megabytes) * 2**20 if megabytes.isdigit() else 0, gpus), count=len(lines))


def surely_no_gpu() -> bool:
    """Whether this machine certainly has no GPU, without torch: no nvidia-smi and no device node of NVIDIA, AMD or WSL."""
    nodes = (*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("dxg"))
    return shutil.which("nvidia-smi") is None and not nodes


def named_by_driver(name: str, memory: int, gpus: Mapping[str, Device]) -> Device:
    """The catalogue card that best matches a driver's name and memory in bytes (0 if unknown), with that name and memory."""
    by_key = {_key(known): gpu for known, gpu in gpus.items()}
    key = _key(name)
    known = by_key.get(key) or next((gpu for k, gpu in by_key.items() if k.startswith(key) or key.startswith(k)), None)
    if known is None:
        return replace(_of_size(max(1.0, memory / GIB), gpus), name=name, memory_bytes=memory)
    return replace(known, name=name, memory_bytes=memory or known.memory_bytes)


#: FLOP/s per core, and memory bandwidth in bytes/s, until `--calibrate` has measured them.
_CORE_FLOPS = {"float32": 5e10, "bfloat16": 1.2e11}
_CPU_BANDWIDTH = 2e10

#: Training runs of the demo took 28 to 99 MiB more with AMX than without (SmolLM2-135M, Intel Xeon, 5th generation).
_AMX_PRODUCT_BYTES = 100 << 20


def this_cpu() -> Device:
    """The CPU of this machine; its speed is a guess until it is calibrated."""
    import psutil

    flags = _cpu_flags()
    dtype, _ = cpu_compute_dtype(flags)
    cores = usable_cores()
    flops = {"float32": cores * _CORE_FLOPS["float32"], "bfloat16": cores * _CORE_FLOPS["bfloat16"]}
    if dtype == "float32":
        flops["bfloat16"] = 0.0
    memory = int(psutil.virtual_memory().total)
    kept = _AMX_PRODUCT_BYTES if "amx_bf16" in flags else 0
    return Device("cpu", cpu_name(), 1, memory, flops, _CPU_BANDWIDTH, 0.0, product_bytes=kept)


def _cpu_flags() -> dict[str, bool]:
    """The CPU flags under their Linux names, which torch also uses; empty if the platform does not report them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return dict.fromkeys(match[1].split(), True) if match else {}
