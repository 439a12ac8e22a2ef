"""Untrusted model folders: refused before anything is opened that could run code or reach outside the folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from tests.support.folders import HOSTILE, edit_json
from tunesmith.errors import ModelError
from tunesmith.models.load import load_model, load_tokenizer, locate, model_digest


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(tmp_path: Path, tiny_model: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    locate(str(folder))  # the unchanged folder passes
    code, spoil = HOSTILE[name]
    spoil(folder)
    begun = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(locate(str(folder)))
    assert code in {problem.code for problem in caught.value.problems}
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize(("layers", "what"), [(1, "belong to no layer of the model"), (3, "missing|values, but a model")])
def test_layers_of_other_architectures_are_counted_too(tmp_path: Path, tokenizer: Any, layers: int, what: str) -> None:
    """An architecture whose shapes none of our tables has."""
    folder, sizes = tmp_path / "model", {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_model(locate(str(folder)), dtype="float32")
    edit_json(folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(ModelError, match=rf"TS215.*({what})"):
        load_model(locate(str(folder)), dtype="float32")


def test_a_hub_s_cache_links_to_its_blobs(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    elsewhere = tmp_path / "models--c--d" / "snapshots" / "0123"
    shutil.copytree(tiny_model, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}", encoding="utf-8")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert locate(str(folder)) == folder
    shutil.copytree(folder, elsewhere, symlinks=True)  # the blobs belong to another repository
    with pytest.raises(ModelError, match="TS205"):
        locate(str(elsewhere))


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
