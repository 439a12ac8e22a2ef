"""The catalogues: every model has its published parameter count, every card has a name, and errors are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import HardwareError, ModelError
from tunesmith.hardware.catalogue import GIB, find_device, read_gpus, this_cpu
from tunesmith.models.catalogue import find_config, known_models
from tunesmith.models.families import read_architecture

GPUS = read_gpus()


@pytest.mark.parametrize("name", known_models())
def test_computed_parameters_are_the_published_ones(name: str) -> None:
    values = known_models()[name]
    assert read_architecture(values, name).parameters == values["parameters"]


def test_the_catalogue_covers_every_dense_architecture_of_note() -> None:
    types = {values["model_type"] for values in known_models().values()}
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "glm", "chatglm", "mixtral"} <= types
    assert len(GPUS) >= 25


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B"),
        ("qwen2-7b", "Qwen/Qwen2-7B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Mistral-Nemo"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("THUDM/glm-4-9b-chat-hf", "THUDM/glm-4-9b-chat"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_tuned_versions_have_their_base_models_shape(asked: str, found: str) -> None:
    assert find_config(asked) == (known_models()[found], f"catalogue: {found}")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ModelError) as caught:
        find_config("Qwen2-7bb")
    assert "Qwen/Qwen2-7B" in caught.value.problems[0].fix


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"model_type": "llama", "hidden_size": -3}', '{"model_type": "llama"}'])
def test_wrong_config_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        read_architecture(*find_config(str(tmp_path)))
    assert caught.value.problems[0].code in {"TS202", "TS208", "TS211"}
    assert "config.json" in caught.value.problems[0].where


def test_folder_without_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find_config(str(tmp_path))
    assert caught.value.problems[0].code == "TS201"


@pytest.mark.parametrize(
    ("text", "name", "count", "gib"),
    [
        ("H100", "H100", 1, 80),
        ("nvidia h100 pcie", "H100 PCIe", 1, 80),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 1, 24),
        ("rtx4090", "RTX 4090", 1, 24),
        ("8xH100", "H100", 8, 80),
        ("2 x A100-80GB", "A100-80GB", 2, 80),
        ("24GB", "24 GB GPU", 1, 24),
        ("4x16g", "16 GB GPU", 4, 16),
    ],
)
def test_devices_by_name_size_and_number(text: str, name: str, count: int, gib: int) -> None:
    device = find_device(text, GPUS)
    assert (device.name, device.count, device.memory_bytes) == (name, count, gib * GIB)


def test_a_size_is_as_slow_as_the_slowest_card_of_it() -> None:
    device = find_device("24GB", GPUS)
    same = [gpu for gpu in GPUS.values() if gpu.memory_bytes == 24 * GIB and gpu.flops["bfloat16"]]
    assert len(same) > 3
    assert device.flops["bfloat16"] == min(gpu.flops["bfloat16"] for gpu in same)
    assert device.note is not None
    assert device.compute_dtype == "bfloat16"
    assert find_device("T4", GPUS).compute_dtype == "float32"


@pytest.mark.parametrize("text", ["RTX 9090", "", "0xH100", "-3GB", "0GB", "99999GB", "x"])
def test_hardware_that_does_not_exist_is_told(text: str) -> None:
    with pytest.raises(HardwareError) as caught:
        find_device(text, GPUS)
    assert caught.value.problems[0].code == "TS701"


def test_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(HardwareError) as caught:
        find_device("RTX 4091", GPUS)
    assert "RTX 4090" in caught.value.problems[0].fix


def test_own_cards_add_and_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    card = "{ memory_gib = 30, bfloat16 = 100, float32 = 20, bandwidth = 500, price = 9.5 }"
    file.write_text(f'[gpus]\n"Mine" = {card}\n"H100" = {card}\n', encoding="utf-8")
    monkeypatch.setenv("TUNESMITH_GPUS", str(file))
    gpus = read_gpus()
    assert find_device("mine", gpus).price == 9.5
    assert gpus["H100"].memory_bytes == 30 * GIB
    assert len(gpus) == len(GPUS) + 1


@pytest.mark.parametrize(
    "text", ["[gpus", "x = 1", "[gpus]\nA = 3", "[gpus]\nA = { memory_gib = -1 }", "[gpus]\nA = { memory_gib = true }"]
)
def test_wrong_card_files_are_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(HardwareError) as caught:
        read_gpus(file)
    assert caught.value.problems[0].code == "TS702"
    assert caught.value.problems[0].where == str(file)


def test_this_cpu_multiplies_as_training_will() -> None:
    import torch

    from tunesmith.hardware import detect

    here = detect()
    if here.device != "cpu":
        pytest.skip("this machine has a GPU")
    cpu = this_cpu()
    assert cpu.compute_dtype == here.compute_dtype
    assert cpu.name == here.name
    assert torch.cpu.get_capabilities()


@pytest.mark.parametrize("flags", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_amx_keeps_compiled_products(monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]) -> None:
    monkeypatch.setattr("tunesmith.hardware.catalogue._cpu_flags", lambda: flags)
    assert (this_cpu().product_bytes > 0) == ("amx_bf16" in flags)
