"""Fixtures of the tests that need a GPU. They need no network: models are random, the tokenizer is built here.

Without a GPU they are skipped. `TUNESMITH_GPU_TESTS=cpu` runs the tests that can run on the CPU, to check the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.conftest import random_llama

WORDS = ("the", "river", "runs", "slowly", "past", "an", "old", "mill", "and", "its", "wheel", "turns", "once", "more")
UNKNOWN, END = "<unknown>", "<end>"
SMALL = {"num_hidden_layers": 2, "eos_token_id": 1, "pad_token_id": 1}


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        for dtype in (torch.float32, torch.bfloat16):  # cuBLAS allocates its workspaces with each thread's first GEMMs
            layer = torch.nn.Linear(64, 64, device="cuda", dtype=dtype)
            layer(torch.ones((64, 64), device="cuda", dtype=dtype)).sum().backward()
        return torch.device("cuda")
    if os.environ.get("TUNESMITH_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    pytest.skip("there is no GPU")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("this one needs a GPU in any case")
    return device


@pytest.fixture(scope="session")
def word_tokenizer(device: torch.device) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate((UNKNOWN, END, *WORDS))}, unk_token=UNKNOWN))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, eos_token=END, pad_token=END)


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random 2-layer Llama with that tokenizer."""
    return random_llama(
        tmp_path_factory.mktemp("models") / "words", word_tokenizer, **SMALL, hidden_size=64, intermediate_size=128
    )


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A wider model, whose activations span many of the allocator's segments."""
    return random_llama(
        tmp_path_factory.mktemp("models") / "wide", word_tokenizer, **SMALL, hidden_size=1024, intermediate_size=16384
    )
