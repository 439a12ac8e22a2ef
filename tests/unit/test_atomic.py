"""Commits: the old content or the new, never a part, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.io.atomic import append_jsonl, commit_folder, read_json, sha256_file, write_json, write_text


def test_failed_folder_commit_keeps_the_old(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with commit_folder(final) as folder:
        (folder / "a").write_text("old", encoding="utf-8")

    def fail_halfway() -> None:
        with commit_folder(final) as folder:
            (folder / "a").write_text("new", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert (final / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_many_processes_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code = "import sys; from pathlib import Path; from tunesmith.io.atomic import write_json\n"
    code += "for n in range(60): write_json(Path(sys.argv[1]), {'from': sys.argv[2], 'n': n})"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert read_json(path)["n"] == 59
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writers_partial_file_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    (tmp_path / f".a.json.{2**22 + 1}-0.partial").write_text("half", encoding="utf-8")  # above Linux' largest pid
    living = tmp_path / f".a.json.{os.getppid()}-0.partial"
    living.write_text("half", encoding="utf-8")
    write_json(tmp_path / "a.json", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, "a.json"]


def test_folder_commit_replaces_the_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for name in ("a", "b"):
        with commit_folder(final) as folder:
            (folder / name).write_text(name, encoding="utf-8")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_commit_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x", encoding="utf-8")
    with commit_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a", encoding="utf-8")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_committed_files_are_readable_by_others(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out") as folder:
        descriptor = os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o666 & ~umask


def test_json_refuses_nan_and_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = sha256_file(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert sha256_file(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_write_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_append_jsonl_appends(tmp_path: Path) -> None:
    for number in range(3):
        append_jsonl(tmp_path / "a.jsonl", {"n": number})
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
