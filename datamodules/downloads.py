"""Getting published archives: resumed where they broke off, unpacked whole or not at all."""

import errno
import hashlib
import lzma
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
from rich.filesize import decimal

from common.errors import UserError
from common.files import atomic_folder, refuse_full
from datamodules.files import images_by_id

__all__ = ["ISIC_ARCHIVE", "Download", "count_images", "fetch", "isic_archives", "unpack"]

ISIC_ARCHIVE = "https://isic-challenge-data.s3.amazonaws.com"
ATTEMPTS = 6
# Bytes read at a time; what has come of the last one is lost when the connection breaks.
CHUNK = 1 << 16
TIMEOUT = 30  # seconds without a byte
# An archive that unpacks to more bytes and to more times its own size was made to fill disks:
# photographs and masks are compressed already, and tables are small.
SUSPICIOUS_SIZE = 10_000_000
SUSPICIOUS_RATIO = 100
# Any byte of an archive may be damaged: a name, a place in it, a compression and its data.
_DAMAGED = (
    EOFError,
    IndexError,
    NotImplementedError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# Numbers of errors that do not come from the disk; bzip2's errors have none.
_DAMAGED_NUMBERS = {
    None,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}
# Servers that are busy or broken for the moment; anything else will not get better by waiting.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Download:
    """A file of a dataset as its publisher serves it.

    Attributes:
        url: where it is.
        images: photographs or masks in the folder that the archive holds; 0 for a table.
        sha256: its digest, where the publisher says it.
    """

    url: str
    images: int = 0
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.url).name

    @property
    def target(self) -> str:
        """What is there when it is done: a folder for an archive, otherwise the file."""
        return self.name.removesuffix(".zip")


def isic_archives(
    year: int, folders: Sequence[tuple[str, str, str]], counts: Sequence[int]
) -> tuple[Download, ...]:
    """Return what the ISIC archive serves of a segmentation challenge.

    Args:
        year: of the challenge.
        folders: part, folder of images and folder of masks, each an archive of its name.
        counts: images in each part.
    """
    return tuple(
        Download(f"{ISIC_ARCHIVE}/{year}/{name}.zip", count)
        for (_, *names), count in zip(folders, counts, strict=True)
        for name in names
    )


def fetch(
    download: Download,
    folder: Path,
    url: str | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    pause: float = 1.0,
) -> Path:
    """Download a file into a folder, going on from what an earlier attempt has left.

    Until it is whole the file is called `<name>.partial`.

    Args:
        download: what to get.
        folder: where to; made if missing.
        url: another place to get it from.
        progress: called with the bytes so far and all bytes, where known.
        pause: seconds before the second attempt; doubled for each further one.

    Returns:
        The file.

    Raises:
        UserError: the server refuses it, the connection broke too often, or the digest is wrong.
    """
    url = url or download.url
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / download.name, folder / f"{download.name}.partial"
    if not path.is_file():
        for attempt in range(ATTEMPTS):
            try:
                _continue(url, partial, progress)
                break
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", None)
                if attempt == ATTEMPTS - 1 or (status and status not in _TRANSIENT):
                    raise UserError(
                        f"{url} cannot be downloaded ({_reason(error)}); check the connection and "
                        "give the same command again: what has come so far is kept."
                    ) from error
                time.sleep(pause * 2**attempt)
    _check_digest(download, partial if partial.is_file() else path)
    if partial.is_file():
        partial.replace(path)
    return path


def _continue(url: str, partial: Path, progress: Callable[[int, int | None], None]) -> None:
    """Get the rest of a file; raise where the connection breaks before its end."""
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    # Compressed on the way, lengths and ranges would be those of other bytes.
    headers["Accept-Encoding"] = "identity"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # Nothing after what is there.
            if _total(response) == have:
                return
            partial.unlink()
            raise requests.ConnectionError("the file on the server is another one now")
        response.raise_for_status()
        if response.status_code != 206:  # The server sends it from the start.
            have = 0
        total = _total(response)
        with partial.open("ab" if have else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
    if total is not None and have != total:
        raise requests.ConnectionError(f"the connection ended after {have} of {total} bytes")


def _total(response: requests.Response) -> int | None:
    """Return the length of the whole file, where the server says it."""
    ranged = response.headers.get("Content-Range", "").rpartition("/")[2]
    text = ranged if response.status_code in (206, 416) else response.headers.get("Content-Length")
    return int(text) if text and text.isdigit() else None


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    return type(error).__name__ if len(str(error)) > 200 else str(error)


def _check_digest(download: Download, path: Path) -> None:
    if download.sha256 is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != download.sha256:
        path.unlink()
        raise UserError(
            f"{path.name} has the SHA-256 digest {digest}, published is {download.sha256}; it was "
            "removed. Give the same command again."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into a folder of its own, which appears when all of it is there.

    An archive with one folder at its top, named like the archive, gives that folder's content.

    Raises:
        UserError: the archive is damaged, encrypted, made to fill the disk or larger than its room,
            or a member would be written outside the folder. Nothing is unpacked then.
        OSError: the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                _refuse_escape(archive, member)
            _refuse_encrypted(archive, members, folder)
            _refuse_bomb(archive, members)
            size = sum(member.file_size for member in members)
            refuse_full(folder, size, f"the files of {archive.name}", "paths.data")
            with atomic_folder(folder) as temporary:
                file.extractall(temporary)
                _lift(temporary, folder.name)
    except UserError:
        raise
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGED_NUMBERS:
            raise
        archive.unlink(missing_ok=True)
        reason = str(error) or type(error).__name__
        raise UserError(
            f"The archive {archive} is damaged ({reason}); it was removed. Give the same command "
            "again to get it anew."
        ) from error


def _refuse_escape(archive: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    link = (member.external_attr >> 16) & 0o170000 == 0o120000
    drive = ":" in "".join(path.parts[:1])
    if path.is_absolute() or ".." in path.parts or drive or link:
        raise UserError(
            f"The archive {archive} has the member {member.filename!r}, which would be written "
            "outside its folder; it is not unpacked. Get the archive from its publisher."
        )


def _refuse_encrypted(archive: Path, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    encrypted = [member.filename for member in members if member.flag_bits & 1]
    if encrypted:
        raise UserError(
            f"The archive {archive} is encrypted ({len(encrypted)} of {len(members)} members, the "
            f"first {encrypted[0]!r}); unpack it with its password into {folder}, or remove it and "
            "get one without a password from its publisher."
        )


def _refuse_bomb(archive: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    # More than these sizes is never written, whatever the compressed bytes hold.
    size, packed = sum(member.file_size for member in members), archive.stat().st_size
    if size > SUSPICIOUS_SIZE and size > SUSPICIOUS_RATIO * packed:
        raise UserError(
            f"The archive {archive} of {decimal(packed)} would unpack to {decimal(size)}, more "
            f"than {SUSPICIOUS_RATIO} times its size, which no images do; it is not unpacked. "
            "Remove it and get the archive from its publisher."
        )


def _lift(folder: Path, name: str) -> None:
    """Move the content of the one folder that an archive holds up into its own."""
    inner = folder / name
    if inner.is_dir():
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
        if list(folder.iterdir()) == [inner]:
            aside = inner.rename(folder / f"{name}.inner")
            for path in list(aside.iterdir()):
                path.rename(folder / path.name)
            aside.rmdir()


def count_images(folder: Path) -> int:
    """Return the number of photographs or masks in a folder."""
    return len(images_by_id([folder], []))
