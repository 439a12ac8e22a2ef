"""LLaMA-Factory in its own virtual environment, created on first use: its pins conflict with ours.

It pins torch to this environment's version, so that no other build is downloaded.
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
    """The environment's Python. Raises CalledProcessError if LLaMA-Factory cannot be installed with this torch."""
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
    """Remove image and audio decoding: it is compiled for CUDA, and with a CPU build of torch its import fails."""
    if torch.version.cuda is not None:
        return
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    for compiled in folder.glob("lib/python*/site-packages/torchaudio/lib"):
        shutil.rmtree(compiled)


def paths() -> dict[str, str]:
    """Variables that its process needs: the path of this package, only for the memory meter, and offline settings."""
    source = Path(tunesmith.__file__).resolve().parents[1]
    return {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DISABLE_VERSION_CHECK": "1"}
