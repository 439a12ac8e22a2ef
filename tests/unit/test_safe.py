"""Foreign model folders: refused before anything is opened that could run code or reach outside."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.unit.folders import HOSTILE, edit_json
from tunesmith.errors import ModelError
from tunesmith.models.load import load_tokenizer, locate, model_digest


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(tmp_path: Path, tiny_model: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    locate(str(folder))  # as it was, it passes
    code, spoil = HOSTILE[name]
    spoil(folder)
    begun = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(locate(str(folder)))
    assert code in {problem.code for problem in caught.value.problems}
    assert time.perf_counter() - begun < 10


def test_missing_folder_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        locate("./no-such-model")
    assert caught.value.problems[0].code == "TS201"
    assert "no-such-model" in caught.value.problems[0].where


def test_unreachable_hub_id_is_a_readable_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        locate("nobody/no-such-model")
    assert caught.value.problems[0].code == "TS206"


def test_digest_follows_content_not_place(tmp_path: Path, tiny_model: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tiny_model, copied)
    assert model_digest(copied) == model_digest(tiny_model)
    edit_json(copied / "generation_config.json", max_length=7)
    assert model_digest(copied) != model_digest(tiny_model)
    (copied / "notes.md").write_text("no part of the model", encoding="utf-8")
    changed = model_digest(copied)
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(bytes(weights))
    assert model_digest(copied) != changed
