"""Files and folders are whole or absent."""

import pytest

from common.files import atomic_folder, atomic_path, remove_leftovers, write_text_atomic


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "note.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path) as temporary:
        temporary.write_text("half") and (tmp_path / "gone").read_text()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "half").write_text("1") and (tmp_path / "gone").read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as slow:
        (slow / "who").write_text("slow")
        with atomic_folder(path) as quick:
            (quick / "who").write_text("quick")
    assert (path / "who").read_text() == "quick"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "deep").mkdir()
    with atomic_path(tmp_path / "deep" / "last.ckpt") as temporary:
        temporary.write_text("whole")
        left = temporary.with_name(temporary.name.replace("last", "best"))
        left.write_text("half")
    (tmp_path / ".hidden").touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"deep", "last.ckpt", ".hidden"}
