"""Commits: the old content or the new, never a partial one, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunError
from tunesmith.io.atomic import (
    MANIFEST,
    append_jsonl,
    commit_folder,
    empty_folder,
    read_json,
    remove_folder,
    sha256_file,
    write_json,
    write_text,
)


def test_failed_folder_commit_keeps_the_old(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with commit_folder(final, "test") as folder:
        (folder / "a").write_text("old", encoding="utf-8")

    def fail_halfway() -> None:
        with commit_folder(final, "test") as folder:
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
        with commit_folder(final, "test") as folder:
            (folder / name).write_text(name, encoding="utf-8")
    assert sorted(p.name for p in final.iterdir()) == [MANIFEST, "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_commit_are_removed(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above Linux' largest pid
    (tmp_path / f".out.tunesmith-{dead}-0.partial").mkdir()
    (tmp_path / f".out.tunesmith-{dead}-0.partial" / "half").write_text("x", encoding="utf-8")
    living = tmp_path / f".out.tunesmith-{os.getppid()}-0.partial"
    living.mkdir()
    with commit_folder(tmp_path / "out", "test") as folder:
        (folder / "a").write_text("a", encoding="utf-8")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MANIFEST, "a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, "out"]


def test_what_a_killed_commit_had_moved_aside_comes_back(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", "test") as folder:
        (folder / "a").write_text("old", encoding="utf-8")
    (tmp_path / "out").rename(tmp_path / f".out.tunesmith-{2**22 + 1}-7.retired")  # as between the two renames

    def fail() -> None:
        with commit_folder(tmp_path / "out", "test"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "out" / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_committed_files_are_readable_by_others(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", "test") as folder:
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


def _put_file(final: Path) -> None:
    (final / "mine.txt").write_text("mine", encoding="utf-8")


def _change(final: Path) -> None:
    (final / "a").write_text("hand", encoding="utf-8")


def _folder_in_its_place(final: Path) -> None:
    (final / "a").unlink()
    (final / "a").mkdir()


def _link(final: Path) -> None:
    (final / "link").symlink_to(final.parent)


def _empty(final: Path) -> None:
    (final / "empty").mkdir()


def _drop_manifest(final: Path) -> None:
    (final / MANIFEST).unlink()


def _change_manifest(final: Path) -> None:
    (final / MANIFEST).write_text((final / MANIFEST).read_text(encoding="utf-8") + " ", encoding="utf-8")


@pytest.mark.parametrize("touch", [_put_file, _change, _folder_in_its_place, _link, _empty, _drop_manifest, _change_manifest])
def test_a_folder_that_somebody_touched_is_not_replaced(tmp_path: Path, touch: Callable[[Path], None]) -> None:
    final = tmp_path / "out"
    with commit_folder(final, "test") as folder:
        (folder / "a").write_text("same", encoding="utf-8")
    touch(final)
    before = {p.name: p.is_file() and p.read_bytes() for p in final.iterdir()}
    with pytest.raises(RunError, match="TS015"), commit_folder(final, "test"):
        raise AssertionError("nothing begins")
    assert {p.name: p.is_file() and p.read_bytes() for p in final.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_lost_a_file_is_replaced(tmp_path: Path) -> None:
    """A missing file holds nothing that could be lost."""
    final = tmp_path / "out"
    for content in ("first", "second"):
        with commit_folder(final, "test") as folder:
            (folder / "a").write_text(content, encoding="utf-8")
            (folder / "b").write_text(content, encoding="utf-8")
        assert (final / "a").read_text(encoding="utf-8") == content
        (final / "a").unlink()


def test_what_appears_while_a_folder_is_filled_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def fill() -> None:
        with commit_folder(final, "test") as folder:
            (folder / "a").write_text("a", encoding="utf-8")
            final.write_text("thesis", encoding="utf-8")

    with pytest.raises(RunError, match="there is a file at this path"):
        fill()
    assert final.read_text(encoding="utf-8") == "thesis"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_kind_a_file_and_the_working_folder_are_not_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    with commit_folder(tmp_path / "out", "one") as folder:
        (folder / "a").write_text("a", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for final in (tmp_path / "out", tmp_path / "file", tmp_path / "file" / "below", Path()):
        with pytest.raises(RunError, match="TS015"), commit_folder(final, "two"):
            raise AssertionError("nothing begins")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far")
    for name in ("a", "b"):
        with commit_folder(tmp_path / "out", "test") as folder:
            (folder / name).write_text(name, encoding="utf-8")
    assert (tmp_path / "out").is_symlink()
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == [MANIFEST, "b"]


def test_removal_of_what_has_no_manifest_goes_by_the_names(tmp_path: Path) -> None:
    """Folders as left by a power cut: removed only if all files are of the kinds that are written there."""
    for name, files in {"ours": ["a.json", "b.safetensors"], "mixed": ["a.json", "mine.txt"]}.items():
        with commit_folder(tmp_path / name, "test") as folder:
            for file in files:
                (folder / file).write_text("a", encoding="utf-8")
        (tmp_path / name / MANIFEST).write_text("", encoding="utf-8")
        remove_folder(tmp_path / name, (".json", ".safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["mixed"]
    assert (tmp_path / "mixed" / "mine.txt").is_file()


def test_removal_spares_what_was_put_there(tmp_path: Path) -> None:
    for name in ("own", "shared"):
        with commit_folder(tmp_path / "live" / name, "test") as folder:
            (folder / "a").write_text("a", encoding="utf-8")
    _put_file(tmp_path / "live" / "shared")
    with pytest.raises(RunError, match=r"it also holds shared/mine\.txt"):
        empty_folder(tmp_path / "live", ["own", "shared"])
    with pytest.raises(RunError, match="shared, shared"):
        empty_folder(tmp_path / "live", ["own"])
    for name in ("own", "shared"):
        remove_folder(tmp_path / "live" / name)
    assert [p.name for p in (tmp_path / "live").iterdir()] == ["shared"]
    (tmp_path / "live" / "shared" / "mine.txt").unlink()
    empty_folder(tmp_path / "live", ["own", "shared"])
    assert list((tmp_path / "live").iterdir()) == []
