"""The values that `auto` resolves to, and exact batch arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.recipes import CPU, recipe
from tunesmith.hardware import cpu_compute_dtype
from tunesmith.methods.settings import auto_batch, auto_rank, settle


def test_rank_by_rows() -> None:
    assert [auto_rank(n) for n in (1, 999, 1_000, 9_999, 10_000, 100_000, 10**9)] == [8, 8, 16, 16, 32, 64, 64]


def test_batch_by_rows() -> None:
    assert [auto_batch(n) for n in (10, 799, 800, 3_200, 32_000, 256_000)] == [8, 8, 16, 32, 64, 128]


def test_defaults_of_the_methods() -> None:
    settings = settle(recipe(), 5_000, CPU)
    assert (settings.learning_rate, settings.r, settings.lora_alpha) == (2e-4, 16, 32)
    assert settings.effective_batch_size == 32
    assert settings.max_steps == math.ceil(5_000 / 32) * 3
    assert settings.warmup_steps == math.ceil(0.05 * settings.max_steps)
    assert settings.reasons["learning_rate"] == "default of lora"
    assert settings.compute_dtype == "float32"


def test_raw_text_is_learned_at_the_rate_of_answers() -> None:
    settings = settle(recipe().model_copy(update={"objective": "pretrain"}), 5_000, CPU)
    assert (settings.learning_rate, settings.reasons["learning_rate"]) == (2e-4, "default of lora")


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-6), ("lora", 1e-5), ("qlora", 1e-5)])
def test_preference_pairs_get_a_twentieth_of_the_rate(method: str, rate: float) -> None:
    asked = recipe().model_copy(update={"objective": "dpo", "method": method})
    settings = settle(asked, 5_000, CPU)
    assert settings.learning_rate == rate
    assert settings.reasons["learning_rate"] == f"default of {method} with DPO"


def test_recipe_wins() -> None:
    asked = recipe(
        learning_rate=0.01, max_steps=5, effective_batch_size=6, per_device_train_batch_size=4, compute_dtype="bfloat16"
    )
    settings = settle(asked, 100, CPU)
    assert (settings.learning_rate, settings.max_steps, settings.compute_dtype) == (0.01, 5, "bfloat16")
    assert settings.reasons["learning_rate"] == "recipe"


@given(rows=st.integers(1, 500), micro=st.integers(1, 40), batch=st.integers(1, 200), epochs=st.floats(0.1, 5))
def test_batch_arithmetic(rows: int, micro: int, batch: int, epochs: float) -> None:
    asked = recipe(per_device_train_batch_size=micro, effective_batch_size=batch, num_train_epochs=epochs)
    settings = settle(asked, rows, CPU)
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == settings.effective_batch_size
    assert 1 <= settings.per_device_train_batch_size <= min(micro, rows)
    assert settings.max_steps >= 1
    assert settings.effective_batch_size == batch


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({}, "float32"), ({"avx2": True}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")],
)
def test_cpu_dtype_by_instructions(flags: dict[str, bool], dtype: str) -> None:
    assert cpu_compute_dtype(flags)[0] == dtype
