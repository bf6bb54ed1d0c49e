"""Whole or not at all."""

import pytest

from vision_attn.errors import UsageError
from vision_attn.files import free_path, is_taken, new_folder, write_whole


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


def test_free_names_count_up_before_the_suffix(tmp_path):
    assert free_path(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_path(tmp_path / "run") == tmp_path / "run-3"
    (tmp_path / "a.json").touch()
    assert free_path(tmp_path / "a.json") == tmp_path / "a-2.json"


def test_an_empty_folder_is_free(tmp_path):
    assert not is_taken(tmp_path)
    (tmp_path / "x").touch()
    assert is_taken(tmp_path)
    assert is_taken(tmp_path / "x")


def test_a_link_to_nowhere_is_taken(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert is_taken(tmp_path / "run")
    assert free_path(tmp_path / "run") == tmp_path / "run-2"
