"""Whole or not at all."""

import contextlib
import os
from pathlib import Path

import pytest

from vision_attn import files
from vision_attn.errors import UsageError
from vision_attn.files import free_path, is_taken, new_file, new_folder, remove_parts, write_whole


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


def test_a_full_disk_leaves_the_old_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    write_whole(tmp_path / "x.txt", "old")
    with pytest.raises(UsageError, match="No space left on device"), new_file(tmp_path / "x.txt") as file:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"new")
        file.write(b"never reached")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.txt", "old")]


class Killed(BaseException):
    """What stands for the end of the process."""


class Disk:
    """Kills the process at its operation number `last`: that one and all after it, those of `finally` too, fail."""

    def __init__(self, monkeypatch, last: int) -> None:
        self.done, self.last = [], last
        for owner, name in ((files, "open"), (os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self.counted(name, getattr(owner, name, open)), raising=False)

    def counted(self, name, operation):
        def call(*args, **kwargs):
            self.done.append(name)
            if len(self.done) > self.last:
                raise Killed
            return operation(*args, **kwargs)

        return call


def test_a_kill_at_any_operation_leaves_the_old_file_or_the_new_one_whole(tmp_path, monkeypatch):
    seen = []
    for last in range(7):
        folder = tmp_path / str(last)
        write_whole(folder / "x", b"old" * 1000)
        with monkeypatch.context() as patch:
            disk = Disk(patch, last)
            with contextlib.suppress(Killed), new_file(folder / "x", durable=True) as file:
                file.write(b"new" * 1000)
        seen.append((folder / "x").read_bytes()[:3].decode())
        assert (folder / "x").stat().st_size == 3000
        remove_parts(folder)
        assert [path.name for path in folder.iterdir()] == ["x"]
    # The content is on the disk before it takes the name, and the name is after it.
    assert disk.done == ["mkdir", "open", "fsync", "replace", "fsync", "unlink"]
    assert seen == ["old"] * 4 + ["new"] * 3


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
    (tmp_path / ".export.4711.part" / "sub").mkdir(parents=True)
    remove_parts(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["sub"]


def test_an_empty_folder_is_free(tmp_path):
    assert not is_taken(tmp_path)
    (tmp_path / "x").touch()
    assert is_taken(tmp_path)
    assert is_taken(tmp_path / "x")


def test_a_link_to_nowhere_is_taken(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert is_taken(tmp_path / "run")
    assert free_path(tmp_path / "run") == tmp_path / "run-2"
