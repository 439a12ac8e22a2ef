"""Broken or hostile model folders: each a change to a sound one, with the error code that refuses it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")


def index(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")


def link_out(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "extra.json").symlink_to(folder.parent / "secret.json")


def link_to_blobs(folder: Path) -> None:
    """A link like those of the hub's cache, but to another owner's folder with the same name."""
    private = folder.parent / "else" / "blobs"
    private.mkdir(parents=True)
    (private / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "extra.json").symlink_to(private / "secret.json")


def text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def config(**changes: object) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tokenizer_config(**changes: object) -> Spoil:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def header(change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Spoil:
    """Weights with a changed header and unchanged data."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        value = json.loads(content[8 : 8 + length])
        made = change(value)
        packed = (made if isinstance(made, str) else json.dumps(value)).encode()
        path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :] + more)

    return spoil


def first(value: dict[str, Any]) -> dict[str, Any]:
    """The entry of the file's first tensor."""
    tensors = (each for name, each in value.items() if name != "__metadata__")
    return min(tensors, key=lambda each: each["data_offsets"][0])


def saved(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Sound weights with different tensors."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else in place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def tokenizer(**changes: object) -> Spoil:
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def repeated(letter: str, times: int) -> dict[str, object]:
    """A normaliser that doubles a letter `times` times."""
    double = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}
    return {"type": "Sequence", "normalizers": [double] * times}


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def outside(folder: Path) -> Path:
    """A private file next to the folder."""
    path = folder.parent / "private.txt"
    path.write_text("private\n", encoding="utf-8")
    return path


LAYER = "model.layers.1.mlp.up_proj.weight"
QKV = "model.layers.0.self_attn.k_proj.weight"

HOSTILE: dict[str, tuple[str, Spoil]] = {
    # Code execution.
    "pickle beside the weights": ("TS203", lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80")),
    "checkpoint pickle": ("TS203", lambda f: (f / "optimizer.pt").write_bytes(b"\x80")),
    "auto_map in the config": ("TS204", config(auto_map={"AutoModel": "evil.Model"})),
    "auto_map deep in the config": ("TS204", config(text_config={"vision": [{"auto_map": {"AutoModel": "evil.Model"}}]})),
    "auto_map in the tokenizer": ("TS204", tokenizer_config(auto_map={"AutoTokenizer": "e.T"})),
    "auto_map of generation": ("TS204", text("generation_config.json", '{"auto_map": {"GenerationConfig": "e.G"}}')),
    "auto_map of a processor": ("TS204", text("processor_config.json", '{"auto_map": {"AutoProcessor": "e.P"}}')),
    "auto_map of images": ("TS204", text("preprocessor_config.json", '{"auto_map": {"AutoImageProcessor": "e.P"}}')),
    "auto_map of videos": ("TS204", text("video_preprocessor_config.json", '{"auto_map": {"AutoVideoProcessor": "e.P"}}')),
    "trust asked for by the config": ("TS204", config(trust_remote_code=True)),
    "attention from a hub": ("TS204", config(_attn_implementation="somebody/kernels")),
    "attention from a hub, by its other name": ("TS204", config(attn_implementation="somebody/kernels:f")),
    "attention that a hub has": ("TS204", config(_attn_implementation="flash_attention_2")),
    "experts from a hub": ("TS204", config(_experts_implementation="somebody/kernels")),
    "quantised with kernels of a hub": ("TS212", config(quantization_config={"quant_method": "mxfp4"})),
    # Paths that lead outside.
    "an adapter over another model": ("TS213", text("adapter_config.json", '{"base_model_name_or_path": "../other"}')),
    "index up": ("TS205", lambda f: index(f, "../other.safetensors")),
    "index absolute": ("TS205", lambda f: index(f, "/etc/passwd")),
    "index to nothing": ("TS205", lambda f: index(f, "model-00001-of-00002.safetensors")),
    "index without a map": ("TS202", text("model.safetensors.index.json", "{}")),
    "index that is a list": ("TS202", text("model.safetensors.index.json", "[]")),
    "link out": ("TS205", link_out),
    "link to somebody's blobs": ("TS205", link_to_blobs),
    "link out among the templates": (
        "TS205",
        lambda f: ((f / "additional_chat_templates").mkdir(), (f / "additional_chat_templates/x.jinja").symlink_to(outside(f))),
    ),
    "link to itself": ("TS211", instead("extra.json", lambda p: p.symlink_to(p))),
    "a vocabulary from elsewhere": ("TS205", lambda f: edit_json(f / "tokenizer_config.json", vocab_file=str(outside(f)))),
    "merges from elsewhere": (
        "TS205",
        lambda f: edit_json(f / "tokenizer_config.json", merges_file=f"../{outside(f).name}"),
    ),
    # Not regular files.
    "no weights": ("TS202", lambda f: (f / "model.safetensors").unlink()),
    "no config": ("TS202", lambda f: (f / "config.json").unlink()),
    "no tokenizer": ("TS216", without_tokenizer),
    "a folder as config": ("TS211", instead("config.json", Path.mkdir)),
    "a pipe as config": ("TS211", instead("config.json", os.mkfifo)),
    "a pipe as generation config": ("TS211", instead("generation_config.json", os.mkfifo)),
    "a folder as weights": ("TS211", instead("model.safetensors", Path.mkdir)),
    "a pipe as weights": ("TS211", instead("model.safetensors", os.mkfifo)),
    "a pipe as further weights": ("TS211", instead("x.safetensors", os.mkfifo)),
    "a folder as tokenizer": ("TS211", instead("tokenizer.json", Path.mkdir)),
    "a pipe as tokenizer": ("TS211", instead("tokenizer.json", os.mkfifo)),
    "a pipe as template": ("TS211", instead("chat_template.jinja", os.mkfifo)),
    "an endless template": ("TS211", instead("chat_template.jinja", lambda p: p.write_bytes(b"x" * (2 << 20)))),
    "a config of 100 MB": ("TS211", instead("config.json", lambda p: p.write_bytes(b" " * (100 << 20) + b"{}"))),
    # Invalid JSON, or JSON of the wrong kind.
    "config is a list": ("TS202", text("config.json", "[]")),
    "config is not JSON": ("TS202", text("config.json", "{")),
    "config is not UTF-8": ("TS202", lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}')),
    "config nested too deeply": ("TS202", text("config.json", '{"a": ' * 100_000)),
    "generation config is not JSON": ("TS202", text("generation_config.json", "{")),
    "generation config stops at a word": ("TS211", text("generation_config.json", '{"eos_token_id": "</s>"}')),
    "tokenizer config is a list": ("TS202", text("tokenizer_config.json", "[]")),
    "tokenizer is not JSON": ("TS216", text("tokenizer.json", "{")),
    "tokenizer of another kind": ("TS216", text("tokenizer.json", '{"version": "1.0", "model": {"type": "[/foo]"}}')),
    "normaliser that explodes": ("TS216", tokenizer(normalizer=repeated("a", 40))),
    "normaliser that explodes at one letter": ("TS216", tokenizer(normalizer=repeated("q", 12))),
    "pattern without end": (
        "TS216",
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(?:(?:(?:a|aa)+)+)+(?=b)"},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
    ),
    # Sizes.
    "model type with markup": ("TS211", config(model_type="[/foo]")),
    "model type that is a list": ("TS211", config(model_type=["llama"])),
    "10^9 layers": ("TS211", config(num_hidden_layers=10**9)),
    "layers below nothing": ("TS211", config(num_hidden_layers=-2)),
    "hidden size as text": ("TS211", config(hidden_size="64")),
    "vocabulary beyond all": ("TS211", config(vocab_size=10**15)),
    "7 key-value heads for 4": ("TS211", config(num_key_value_heads=7)),
    "no key-value heads": ("TS211", config(num_key_value_heads=0)),
    "a hidden size that is not the weights'": ("TS215", config(hidden_size=128, head_dim=16)),
    "a vocabulary that is not the weights'": ("TS215", config(vocab_size=1 << 36)),
    "an MLP that is not the weights'": ("TS215", config(intermediate_size=256)),
    "more layers than weights": ("TS215", config(num_hidden_layers=3)),
    "fewer layers than weights": ("TS215", config(num_hidden_layers=1)),
    "a weight is missing": ("TS215", saved(lambda t: t.pop(LAYER))),
    "the embedding is missing": ("TS215", saved(lambda t: t.pop("model.embed_tokens.weight"))),
    "a weight lies on its side": ("TS215", saved(lambda t: t.update({QKV: t[QKV].T.contiguous()}))),
    # Weights.
    "4 GB header": ("TS211", lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4 << 30) + b"{}")),
    "torn weights": ("TS211", lambda f: (f / "model.safetensors").write_bytes(b"\x01\x02")),
    "weights cut short": (
        "TS211",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
    ),
    "bytes behind the weights": ("TS211", header(lambda _: None, b"more")),
    "header is a list": ("TS211", header(lambda _: "[]")),
    "header names a tensor twice": (
        "TS211",
        header(lambda v: json.dumps(v)[:-1] + f', "{LAYER}": {json.dumps(v[LAYER])}}}'),
    ),
    "tensors that overlap": ("TS211", header(lambda v: v[LAYER].update(data_offsets=v[QKV]["data_offsets"]))),
    "a shape beyond its bytes": ("TS211", header(lambda v: first(v).update(shape=[1 << 40, 1 << 20]))),
    "a shape that overflows": ("TS211", header(lambda v: first(v).update(shape=[1 << 63, 2]))),
    "a shape below nothing": ("TS211", header(lambda v: first(v).update(shape=[-1, -64]))),
    "offsets the wrong way round": ("TS211", header(lambda v: first(v)["data_offsets"].reverse())),
    "offsets beyond the file": ("TS211", header(lambda v: first(v).update(data_offsets=[0, 1 << 50]))),
    "a dtype of no kind": ("TS211", header(lambda v: first(v).update(dtype="[/red]"))),
    "an entry without a shape": ("TS211", header(lambda v: first(v).pop("shape"))),
    "an entry that is a number": ("TS211", header(lambda v: v.update({LAYER: 1}))),
}
