"""Every kind of `data.train`, opened through the command line; a local server replaces the hub."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from tests.support.hub import COMMIT, serving

Write = Callable[[Path, list[dict[str, Any]]], object]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def gzipped(write: Write) -> Write:
    def made(path: Path, rows: list[dict[str, Any]]) -> None:
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return made


def zstandard(path: Path, rows: list[dict[str, Any]]) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())


def as_folder(path: Path, rows: list[dict[str, Any]]) -> None:
    as_jsonl(path / "train.jsonl", rows[:1])
    pq.write_table(pa.Table.from_pylist(rows[1:]), path / "train-more.parquet")
    as_jsonl(path / "test.jsonl", [{"instruction": "not this", "output": "one"}])


def as_conll(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{row['instruction']}\tO\n{row['output']}\tB-answer\n\n" for row in rows), encoding="utf-8")


FILES: dict[str, Write] = {
    "a.jsonl": as_jsonl,
    "b.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "c.csv": as_csv,
    "d.jsonl.gz": gzipped(as_jsonl),
    "e.jsonl.zst": zstandard,
    "f.csv.gz": gzipped(as_csv),
    "g.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "h.arrow": as_arrow,
    "i.feather": lambda path, rows: feather.write_feather(pa.Table.from_pylist(rows), path),
    "j": as_folder,
    "k.conll": as_conll,
    "l.conll.gz": gzipped(as_conll),
}
_CONLL = '{path: %s, columns: {prompt: text, completion: "{{ entities | tojson }}"}}'


def rows_of(name: str) -> list[dict[str, Any]]:
    return [{"instruction": f"{name}-{number}-asks", "output": f"{name}-{number}-says"} for number in range(4)]


def prepared(folder: Path, data: str, tiny_model: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(f"model: {tiny_model}\n{data}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "tunesmith", "prepare", "recipe.yaml", "--run", "run"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120
    )


def texts(folder: Path) -> str:
    return (folder / "run" / "data" / "samples.txt").read_text(encoding="utf-8")


def ledger(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "run" / "data" / "ledger.json").read_text(encoding="utf-8"))
    return made


def test_every_kind_of_file_and_the_hub(tmp_path: Path, tiny_model: Path) -> None:
    for name, write in FILES.items():
        write(tmp_path / name, rows_of(name))
    hub = tmp_path / "hub" / "owner" / "set"
    as_jsonl(hub / "data" / "train.jsonl", rows_of("hub"))
    as_jsonl(hub / "data" / "test.jsonl", rows_of("hub-test"))
    sources = [_CONLL % name if ".conll" in name else f"{{path: {name}}}" for name in FILES]
    sources += ["{path: 'hub:owner/set'}", f"{{path: 'hub:owner/set@{COMMIT}', split: test}}"]
    with serving(tmp_path / "hub") as (address, asked):
        data = f"data: {{heldout: 0, sources: [{', '.join(sources)}]}}"
        done = prepared(tmp_path, data, tiny_model, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert asked == ["data/train.jsonl", "data/test.jsonl"]
    told = ledger(tmp_path)
    assert told["rows_in"] == 4 * (len(FILES) + 2)
    assert told["rows_train"] == told["rows_in"]


@pytest.mark.parametrize("source", ["set", "hub:owner/set"])
def test_one_source_alone(source: str, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "set" if source == "set" else tmp_path / "hub" / "owner" / "set"
    as_folder(folder, rows_of("alone"))
    with serving(tmp_path / "hub") as (address, _):
        data = f"data: {{train: '{source}', heldout: 0}}"
        done = prepared(tmp_path, data, tiny_model, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert ledger(tmp_path)["rows_train"] == 4
        # A repeated command does nothing, and a missing revision gives a readable error.
        assert prepared(tmp_path, data, tiny_model, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache")).returncode == 0
        missing = prepared(
            tmp_path, "data: {train: 'hub:nobody/none'}", tiny_model, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache")
        )
    unreached = prepared(
        tmp_path, "data: {train: 'hub:owner/other'}", tiny_model, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache")
    )
    for done in (missing, unreached):
        assert done.returncode == 2
        assert "TS101" in done.stderr


@pytest.mark.parametrize("kind", ["a.txt", "b.md", "folder", "c.jsonl"])
def test_documents(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    text = "A document of some words, and of some more. " * 20
    if kind == "folder":
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "folder" / "deep" / "x.txt").write_text(text, encoding="utf-8")
    else:
        (tmp_path / kind).write_text(json.dumps({"text": text}) if kind.endswith("jsonl") else text, encoding="utf-8")
    done = prepared(tmp_path, f"objective: pretrain\ndata: {{train: {kind}, heldout: 0}}", tiny_model)
    assert done.returncode == 0, done.stderr
    assert ledger(tmp_path)["rows_in"] == 1


def test_a_data_folder_gives_its_own_files_alone(tmp_path: Path, tiny_model: Path) -> None:
    as_jsonl(tmp_path / "private.jsonl", [{"instruction": "the canary asks", "output": "the canary says"}] * 4)
    as_jsonl(tmp_path / "set" / "rows.jsonl", rows_of("own"))
    paths = f"['{tmp_path}/private.jsonl', '**/*.jsonl']"
    told = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {paths}"
    (tmp_path / "set" / "README.md").write_text(f"---\n{told}\n---\n# A data set\n", encoding="utf-8")
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n", encoding="utf-8")
    done = prepared(tmp_path, "data: {train: set, heldout: 0}", tiny_model)
    assert done.returncode == 0, done.stderr
    assert ledger(tmp_path)["rows_in"] == 4
    assert "canary" not in texts(tmp_path)
    assert not (tmp_path / "canary").exists()
