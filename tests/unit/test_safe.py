"""Foreign model folders: refused before anything is opened that could run code or reach outside."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.io.safe import check_model_folder
from tunesmith.models.load import locate, model_digest


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")


def index(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")


def big_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4 << 30) + b"{}")


def link_out(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "extra.json").symlink_to(folder.parent / "secret.json")


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pickle beside the weights": ("TS203", lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80")),
    "checkpoint pickle": ("TS203", lambda f: (f / "optimizer.pt").write_bytes(b"\x80")),
    "auto_map in the config": ("TS204", lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "evil.Model"})),
    "auto_map in the tokenizer": ("TS204", lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": "e.T"})),
    "index up": ("TS205", lambda f: index(f, "../other.safetensors")),
    "index absolute": ("TS205", lambda f: index(f, "/etc/passwd")),
    "index to nothing": ("TS205", lambda f: index(f, "model-00001-of-00002.safetensors")),
    "index without a map": ("TS202", lambda f: (f / "model.safetensors.index.json").write_text("{}", encoding="utf-8")),
    "link out": ("TS205", link_out),
    "4 GB header": ("TS202", big_header),
    "torn weights": ("TS202", lambda f: (f / "model.safetensors").write_bytes(b"\x01\x02")),
    "no weights": ("TS202", lambda f: (f / "model.safetensors").unlink()),
    "no config": ("TS202", lambda f: (f / "config.json").unlink()),
    "config is a list": ("TS202", lambda f: (f / "config.json").write_text("[]", encoding="utf-8")),
    "config is not JSON": ("TS202", lambda f: (f / "config.json").write_text("{", encoding="utf-8")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(tmp_path: Path, tiny_model: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    check_model_folder(folder)  # as it was, it passes
    code, spoil = HOSTILE[name]
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    assert code in {problem.code for problem in caught.value.problems}


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
