"""Whole or not at all."""

import errno
from pathlib import Path

import pytest

from vision_attn.errors import UsageError
from vision_attn.files import free_path, is_taken, new_folder, remove_parts, write_whole


def test_a_file_is_replaced_in_one_step_and_leaves_nothing_beside_it(tmp_path):
    write_whole(tmp_path / "a" / "x.txt", "old")
    write_whole(tmp_path / "a" / "x.txt", b"new")
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("x.txt", "new")]


def test_a_folder_takes_its_name_only_after_success(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"
    with pytest.raises(UsageError, match="which exists"), new_folder(tmp_path / "out"):
        pass


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"expected to write .*file/x.txt, got an error \("):
        write_whole(tmp_path / "file" / "x.txt", "1")
    with pytest.raises(UsageError, match="Not a directory"), new_folder(tmp_path / "file" / "out"):
        pass
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="give it a name"), new_folder("."):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "x.txt", "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_whole(tmp_path / "x.txt", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.txt", "old")]


def test_free_names_count_up_before_the_suffix(tmp_path):
    assert free_path(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_path(tmp_path / "run") == tmp_path / "run-3"
    (tmp_path / "a.json").touch()
    assert free_path(tmp_path / "a.json") == tmp_path / "a-2.json"


def test_parts_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    kept = ["a.png", ".hidden", ".mine.part", "b.12.part", "sub/c.png"]
    for name in (*kept, ".a.png.12.part", "sub/.c.png.4711.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_an_empty_folder_is_free(tmp_path):
    assert not is_taken(tmp_path)
    (tmp_path / "x").touch()
    assert is_taken(tmp_path)
    assert is_taken(tmp_path / "x")


def test_a_link_to_nowhere_is_taken(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert is_taken(tmp_path / "run")
    assert free_path(tmp_path / "run") == tmp_path / "run-2"
