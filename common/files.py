"""Files that are either whole or absent."""

import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from common.errors import UserError

__all__ = [
    "append_line",
    "atomic_folder",
    "atomic_path",
    "exclusive",
    "lock_path",
    "locked",
    "refuse_full",
    "refuse_read_only",
    "remove_folder",
    "remove_leftovers",
    "write_text_atomic",
]

UNFINISHED = ".part"
# What a user can mend: no room, no right to write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Make a user's error of a disk that is full and of a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(str(path.parent))
        if elsewhere or error.errno not in (*_FULL, *_FORBIDDEN):
            raise
        fix = "make room" if error.errno in _FULL else f"make {path.parent} writable"
        raise UserError(
            f"{path} could not be written ({error.strerror}); {fix} and give the command again, a "
            "training with resume=<its folder>. What was there before is whole."
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without error.

    Raises:
        UserError: the disk is full, or the folder cannot be written; an earlier file stays.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _unfinished(path)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """Return a random hidden name beside `path`.

    `tempfile` returns a name only after it has created the file, which a signal in between would
    leave behind.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name, then rename it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread changes a file under its lock, then hold the lock."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path(path))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(path: Path) -> Path:
    """Return the hidden file that is locked while a file changes."""
    return path.with_name(f".{path.name}.lock")


def append_line(path: Path, line: str) -> None:
    """Append a line to a UTF-8 file to which several processes write.

    The end of a line that a killed process has begun is removed first.

    Args:
        path: the file, which may be missing.
        line: without line breaks.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    with locked(path), _explained(path), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` when the block ends without error.

    Where another process has made `path` in the meantime, that one stays and ours is removed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path)
    try:
        temporary.mkdir(mode=0o700)
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, with what killed processes have not finished of it; it may be missing.

    What else has its name, such as a file, is removed too. No other process may be writing it.

    Raises:
        OSError: the folder that holds it cannot be written.
    """
    unfinished = path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}")
    for each in (path, *unfinished):
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has not finished writing in a folder and those within."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder while the block runs.

    The system frees it when a process is killed.

    Raises:
        UserError: another process is in it, or it cannot be written.
    """
    path = folder / ".lock"
    lock = FileLock(path)
    with _explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"Another process is writing to {folder}; wait until it has ended or stop it, or "
                "start a new run."
            ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def refuse_read_only(folder: Path) -> None:
    """Refuse a folder, which need not exist, into which nothing can be written.

    Raises:
        UserError: its file system is read-only, the user has no right, or it is no folder.
    """
    existing = _existing(folder)
    try:
        # Only trying tells: on some file systems, such as NFS, the rights do not say.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written, because {existing} cannot ({error.strerror}); choose "
            "another place with paths.runs=<folder>."
        ) from error


def refuse_full(
    folder: Path,
    needed: float,
    content: str = "the checkpoints of this run",
    key: str = "paths.runs",
) -> None:
    """Refuse a disk without room for what will be written.

    Args:
        folder: on the disk.
        needed: bytes.
        content: what will be written, as a plural.
        key: sets the folder.

    Raises:
        UserError: less is free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {decimal(free)} free and {content} need "
            f"{decimal(int(needed))}; make room, or choose another place with {key}=<folder>."
        )


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    place = folder.absolute()
    return next(parent for parent in (place, *place.parents) if parent.exists())
