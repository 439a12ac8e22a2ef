"""LLaMA-Factory in a virtual environment of its own, made on first use: its pins do not go with ours.

It takes the torch of this environment by its version, so that no other build is fetched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import tunesmith
from tunesmith.io.cache import cache_folder

VERSION = "0.9.5"


def ensure() -> Path:
    """The environment's Python. Raises CalledProcessError where LLaMA-Factory cannot be installed beside this torch."""
    folder = cache_folder() / "peers" / f"llamafactory-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        own_torch = f"torch=={torch.__version__.partition('+')[0]}"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, own_torch], check=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(own_torch + "\n")
            constraints.flush()
            subprocess.run([*pip, "--constraint", constraints.name, f"llamafactory=={VERSION}"], check=True)
        _leave_text_alone(folder, python)
        (folder / "complete").touch()
    return python


def _leave_text_alone(folder: Path, python: Path) -> None:
    """Take out what decodes images and sound: it is compiled for CUDA, and beside a CPU's torch no import gets past it."""
    if torch.version.cuda is not None:
        return
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    for compiled in folder.glob("lib/python*/site-packages/torchaudio/lib"):
        shutil.rmtree(compiled)


def paths() -> dict[str, str]:
    """What its process needs beside its own: this package, for the meter of memory alone."""
    source = Path(tunesmith.__file__).resolve().parents[1]
    return {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DISABLE_VERSION_CHECK": "1"}
