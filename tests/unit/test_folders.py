"""Which files of a folder belong to a split: by name or by the data set's description, and never one outside the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.io.rows import read_rows


def folder_of(tmp_path: Path, *names: str, readme: str | None = None) -> Path:
    folder = tmp_path / "set"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"prompt": "{name}"}}\n', encoding="utf-8")
    if readme is not None:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n", encoding="utf-8")
    return folder


def read(folder: Path, split: str | None = None) -> list[str]:
    return [row.value["prompt"] for row in read_rows(folder, split) if row.value]


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (["a.jsonl", "b/c.jsonl"], None, ["a.jsonl", "b/c.jsonl"]),
        (["train.jsonl", "test.jsonl", "other.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["en-train.jsonl", "en-dev.jsonl"], "validation", ["en-dev.jsonl"]),
        (["train/1.jsonl", "train/0.jsonl", "test/0.jsonl"], None, ["train/0.jsonl", "train/1.jsonl"]),
        (
            ["data/train_sft-00000-of-00001.jsonl", "data/x-00000-of-00001.jsonl"],
            "train_sft",
            ["data/train_sft-00000-of-00001.jsonl"],
        ),
        (["data-00000-of-00001.jsonl", "state.json", "dataset_info.json"], None, ["data-00000-of-00001.jsonl"]),
        (["trained.jsonl", ".cache/train.jsonl"], None, ["trained.jsonl"]),
    ],
)
def test_splits_by_name(tmp_path: Path, names: list[str], split: str | None, wanted: list[str]) -> None:
    folder = folder_of(tmp_path, *names)
    assert read(folder, split) == wanted
    assert [row.where for row in read_rows(folder, split)] == [f"{folder / name}:1" for name in wanted]


@pytest.mark.parametrize(
    ("readme", "split", "wanted"),
    [
        ("configs:\n- config_name: x\n  data_files: b.jsonl", None, ["b.jsonl"]),
        ("configs:\n- config_name: x\n  data_files: [a.jsonl, 'c/*']", None, ["a.jsonl", "c/d.jsonl"]),
        ("configs:\n- config_name: x\n  data_files:\n  - {split: fine, path: c/**}", "fine", ["c/d.jsonl"]),
        (
            "configs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  default: true\n  data_files: b.jsonl",
            None,
            ["b.jsonl"],
        ),
        ("license: mit", None, ["a.jsonl", "b.jsonl", "c/d.jsonl"]),
        ("configs: [}", None, ["a.jsonl", "b.jsonl", "c/d.jsonl"]),
    ],
)
def test_splits_by_description(tmp_path: Path, readme: str, split: str | None, wanted: list[str]) -> None:
    assert read(folder_of(tmp_path, "a.jsonl", "b.jsonl", "c/d.jsonl", readme=readme), split) == wanted


def test_several_configurations_are_not_mixed(tmp_path: Path) -> None:
    readme = "configs:\n- config_name: main\n  data_files: a.jsonl\n- config_name: socratic\n  data_files: b.jsonl"
    with pytest.raises(DataError, match="main, socratic"):
        read(folder_of(tmp_path, "a.jsonl", "b.jsonl", readme=readme))


@pytest.mark.parametrize(
    "readme",
    [
        "configs:\n- config_name: default\n  data_files: {outside}",
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../private.jsonl",
        "configs:\n- config_name: default\n  data_files: ['{outside}', '**/*.jsonl', '../*']",
        "configs:\n- config_name: default\n  data_files: 'file://{outside}'",
        "configs:\n- config_name: default\n  data_files: 'hf://datasets/somebody/private/a.jsonl'",
        "configs:\n- config_name: default\n  data_dir: ..",
        "configs: &a\n- *a",
        "configs:\n- {{data_files: &a [[[*a]]]}}",
    ],
)
def test_a_description_leads_nowhere_else(readme: str, tmp_path: Path) -> None:
    outside = tmp_path / "private.jsonl"
    outside.write_text('{"prompt": "canary"}\n', encoding="utf-8")
    folder = folder_of(tmp_path, "rows.jsonl", readme=readme.format(outside=outside))
    assert read(folder) == ["rows.jsonl"]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private.jsonl").write_text('{"prompt": "canary"}\n', encoding="utf-8")
    folder = folder_of(tmp_path, "rows.jsonl")
    (folder / "more.jsonl").symlink_to(folder / "rows.jsonl")
    assert read(folder) == ["rows.jsonl", "rows.jsonl"]
    (folder / "z.jsonl").symlink_to(tmp_path / "private.jsonl")
    with pytest.raises(DataError, match="leads out of the data folder"):
        read(folder)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files found"):
        read(folder_of(tmp_path, "notes.txt"))
    with pytest.raises(DataError, match=r"(?s)no split 'validation'.*set `split` to one of: test, train"):
        read(folder_of(tmp_path, "train.jsonl", "test.jsonl"), "validation")
