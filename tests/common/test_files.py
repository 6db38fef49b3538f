"""Files and folders are whole or absent."""

import errno
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.files import (
    append_line,
    atomic_folder,
    atomic_path,
    exclusive,
    refuse_full,
    refuse_read_only,
    remove_folder,
    remove_leftovers,
    write_text_atomic,
)
from tasks.checkpoints import AtomicCheckpointIO


def make_folder(path, text):
    with atomic_folder(path) as temporary:
        (temporary / "note.txt").write_text(text)


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


def test_a_folder_is_removed_with_its_unfinished_copies(tmp_path):
    for name in ("a[1]", ".a[1].x.part", "a1", ".a1.x.part", ".a[1].lock"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".a[1].y.part").touch()
    remove_folder(tmp_path / "a[1]")
    assert {p.name for p in tmp_path.iterdir()} == {"a1", ".a1.x.part", ".a[1].lock"}
    (tmp_path / "link").symlink_to(tmp_path / "a1")
    (tmp_path / "file").touch()
    for name in ("link", "file", "missing"):
        remove_folder(tmp_path / name)
        assert not (tmp_path / name).exists()
    assert (tmp_path / "a1" / "deep").is_dir(), "what a link leads to stays"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text_atomic(path, "x" * 20_000),
        lambda path: AtomicCheckpointIO().save_checkpoint({"a": torch.rand(9000)}, path),
    ],
    ids=["text", "checkpoint"],
)
def test_a_full_disk_leaves_what_was_there(tmp_path, small_disk, write):
    path = tmp_path / "last.ckpt"
    path.write_text("the one before")
    with pytest.raises(UserError, match=r"last\.ckpt could not be written.*make room"):
        write(path)
    assert path.read_text() == "the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_forbidden_folder_is_a_user_s_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".note.part"))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UserError, match=r"note could not be written \(Permission denied\); make"):
        write_text_atomic(tmp_path / "note", "one")


def test_what_fails_elsewhere_is_not_taken_for_it(tmp_path):
    denied = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.jpg")
    with pytest.raises(PermissionError), atomic_path(tmp_path / "note"):
        raise denied


def test_two_processes_cannot_share_a_folder(tmp_path):
    script = "from common.files import exclusive; from pathlib import Path; import sys, time\n"
    script += "with exclusive(Path(sys.argv[1])): print('in', flush=True); time.sleep(100)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="Another process is writing"), exclusive(tmp_path):
            raise AssertionError
        other.kill()
    with exclusive(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"], "what was killed holds nothing"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    refuse_read_only(tmp_path / "not" / "yet")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"paths\.runs"):
        refuse_read_only(file / "runs")

    def refuse(**settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written, because"):
        refuse_read_only(tmp_path / "runs")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="only Linux has such a folder")
def test_what_the_rights_promise_is_not_believed():
    with pytest.raises(UserError, match="cannot be written, because /proc cannot"):
        refuse_read_only(Path("/proc/runs"))


def test_too_little_room_is_refused(tmp_path):
    refuse_full(tmp_path / "new", 1000)
    with pytest.raises(UserError, match=r"GB free.*need 1\.0 EB.*paths\.runs"):
        refuse_full(tmp_path, 1e18)


def test_lines_of_several_writers_stay_whole(tmp_path):
    path = tmp_path / "table.csv"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: append_line(path, f"{n},ä"), range(50)))
    assert sorted(path.read_text().splitlines()) == sorted(f"{n},ä" for n in range(50))
    # A writer was killed.
    with path.open("ab") as file:
        file.write(b"50,half")
    append_line(path, "51,whole")
    lines = path.read_text().splitlines()
    assert (len(lines), lines[-1]) == (51, "51,whole")
    path.write_bytes(b"half")
    append_line(path, "1")
    assert path.read_bytes() == b"1\n"


@pytest.mark.parametrize("write", [write_text_atomic, make_folder], ids=["file", "folder"])
def test_a_signal_while_a_file_is_created_leaves_nothing(tmp_path, write):
    class Stopped(BaseException):
        pass

    def interrupt(signum, frame):
        raise Stopped

    before = signal.signal(signal.SIGALRM, interrupt)
    stopped = 0
    try:
        for delay in np.random.default_rng(0).uniform(5e-6, 3e-4, 3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                write(tmp_path / "note", "text")
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                stopped += 1
            shutil.rmtree(tmp_path / "note", ignore_errors=True)
            assert {path.name for path in tmp_path.iterdir()} <= {"note"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped > 100
