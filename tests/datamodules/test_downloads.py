"""Downloads from a server of our own that breaks off, refuses, and serves damaged archives."""

import hashlib
import io
import random
import shutil
import stat
import threading
import zipfile
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.errors import UserError
from datamodules.downloads import CHUNK, Download, fetch, unpack

CONTENT = bytes(range(256)) * 2000
# Nothing makes it smaller.
NOISE = random.Random(0).randbytes(200_000)


class Server(ThreadingHTTPServer):
    """Serves one file; `plan` says for each request how it goes: a status, or bytes to send."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.plan, self.ranges, self.resumes = content, [], [], True
        self.url = f"http://127.0.0.1:{self.server_port}/file.zip"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        step = self.server.plan.pop(0) if self.server.plan else None
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if isinstance(step, HTTPStatus):
            self.send_error(step)
            return
        content = self.server.content
        start = int(asked[6:-1]) if asked and self.server.resumes else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        sent = content[start:] if step is None else content[start : start + step]
        self.wfile.write(sent)


@pytest.fixture
def server():
    server = Server(CONTENT)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, folder, **settings):
    return fetch(Download(server.url, **settings), folder, pause=0.01)


def test_a_file_is_downloaded_once(server, tmp_path):
    path = get(server, tmp_path / "new")
    assert path == tmp_path / "new" / "file.zip"
    assert path.read_bytes() == CONTENT
    get(server, tmp_path / "new")
    assert server.ranges == [None]
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.plan = [200_000, 150_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    first, second, third = server.ranges
    assert first is None
    assert 200_000 - CHUNK < int(second[6:-1]) <= 200_000
    assert 350_000 - 2 * CHUNK < int(third[6:-1]) <= 350_000


def test_what_an_earlier_command_has_left_is_used(server, tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(CONTENT[:300_000])
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_a_whole_file_that_was_not_renamed_is_used(server, tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_longer_rest_is_of_another_file(server, tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_it_anew(server, tmp_path):
    server.resumes = False
    server.plan = [100_000]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.plan = [HTTPStatus(status) for status in (503, 429, 500)]
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_final(server, tmp_path, status):
    server.plan = [HTTPStatus(status)]
    with pytest.raises(
        UserError, match=rf"file.zip cannot be downloaded \(HTTP {status} .*same co"
    ):
        get(server, tmp_path)
    assert server.ranges == [None]


def test_after_some_attempts_it_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.plan = [CHUNK + 1000] * 6
    with pytest.raises(UserError, match="cannot be downloaded"):
        get(server, tmp_path)
    assert (tmp_path / "file.zip.partial").read_bytes() == CONTENT[: 6 * CHUNK]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="127.0.0.1:1/x cannot be downloaded"):
        fetch(Download("http://127.0.0.1:1/x"), tmp_path, pause=0)


def test_a_wrong_digest_is_refused_and_the_file_removed(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert get(server, tmp_path / "right", sha256=digest).is_file()
    with pytest.raises(UserError, match=f"has the SHA-256 digest {digest}, published is 00"):
        get(server, tmp_path / "wrong", sha256="00")
    assert list((tmp_path / "wrong").iterdir()) == []


def test_progress_is_told(server, tmp_path):
    told = []
    fetch(Download(server.url), tmp_path, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (len(CONTENT), len(CONTENT))


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "Data/"])
def test_a_folder_at_the_top_is_not_doubled(tmp_path, prefix):
    members = {f"{prefix}a.jpg": b"1", f"{prefix}sub/b.jpg": b"2"}
    unpack(archive(tmp_path / "Data.zip", members), tmp_path / "Data")
    found = {str(p.relative_to(tmp_path)) for p in (tmp_path / "Data").rglob("*.jpg")}
    assert found == {"Data/a.jpg", "Data/sub/b.jpg"}


def test_what_a_mac_adds_is_left_out(tmp_path):
    members = {"Data/a.jpg": b"1", "__MACOSX/Data/._a.jpg": b"2"}
    unpack(archive(tmp_path / "Data.zip", members), tmp_path / "Data")
    assert [path.name for path in (tmp_path / "Data").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    "name", ["../out.jpg", "/out.jpg", "a/../../out.jpg", "..\\out.jpg", "C:\\o"]
)
def test_members_that_escape_are_refused(tmp_path, name):
    path = archive(tmp_path / "Data.zip", {"fine.jpg": b"1", name: b"2"})
    with pytest.raises(UserError, match="which would be written outside its folder; it is not unp"):
        unpack(path, tmp_path / "in" / "Data")
    assert [p for p in tmp_path.rglob("*.jpg")] == []


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "Data.zip", "w") as file:
        file.writestr(link, "/etc")
    with pytest.raises(UserError, match="outside its folder"):
        unpack(tmp_path / "Data.zip", tmp_path / "Data")


def test_an_archive_that_fills_disks_is_refused(tmp_path):
    path = archive(tmp_path / "Data.zip", {"a.jpg": bytes(8_000_000), "b.jpg": bytes(8_000_000)})
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"Data\.zip of 1.\.. kB would unpack to 16\.0 MB"):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == [path]
    # Small ones do no harm, and photographs hardly shrink.
    for members in ({"a.png": bytes(9_000_000)}, {"a.bmp": bytes(16_000_000), "b.jpg": NOISE}):
        unpack(archive(path, members), tmp_path / "Data")
        assert len(list((tmp_path / "Data").iterdir())) == len(members)
        shutil.rmtree(tmp_path / "Data")


def test_an_encrypted_archive_is_refused(tmp_path):
    path = archive(tmp_path / "Data.zip", {"a.jpg": b"1", "b.jpg": b"2"})
    content = bytearray(path.read_bytes())
    # The first bit of the flags in the second member's header and in its entry of the directory.
    content[content.rindex(b"PK\x03\x04") + 6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"Data\.zip is encrypted \(1 of 2 members.*'b\.jpg'"):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room_for_an_archive_is_named(tmp_path, monkeypatch):
    path = archive(tmp_path / "Data.zip", {"a.jpg": bytes(3000)})
    usage = shutil._ntuple_diskusage(2000, 0, 2000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"2\.0 kB free.*Data\.zip need 3\.0 kB.*paths\.data="):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, small_disk):
    members = {f"{index}.jpg": bytes(9000 + 1000 * index) for index in range(4)}
    path = archive(tmp_path / "Data.zip", members)
    with pytest.raises(OSError, match="large"):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == [path], "the archive is kept for another attempt"


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (zipfile.ZIP_STORED, ["a", "a/b.jpg"]),
        (zipfile.ZIP_STORED, ["x" * 300]),
        (zipfile.ZIP_BZIP2, ["a.jpg"]),
        (zipfile.ZIP_LZMA, ["a.jpg"]),
    ],
    ids=["a file in a file", "long name", "bzip2", "lzma"],
)
def test_damage_of_any_kind_is_named(tmp_path, method, names):
    path = tmp_path / "Data.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names:
            file.writestr(name, NOISE)
    if method != zipfile.ZIP_STORED:
        content = bytearray(path.read_bytes())
        content[100:1000] = bytes(900)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"Data\.zip is damaged \(.+removed"):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "compression", "none"])
def test_a_damaged_archive_is_removed_and_leaves_nothing(tmp_path, damage):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        for index in range(3):
            file.writestr(f"{index}.jpg", CONTENT)
    content = bytearray(whole.getvalue())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(CONTENT) + 2000] ^= 255
    elif damage == "compression":
        # Of the first member in the archive's directory; there is no such method.
        content[content.index(b"PK\x01\x02") + 10] = 99
    else:
        content = b"<html>Sorry</html>"
    path = tmp_path / "Data.zip"
    path.write_bytes(content)
    with pytest.raises(UserError, match="Data.zip is damaged .*removed. Give the same command"):
        unpack(path, tmp_path / "Data")
    assert list(tmp_path.iterdir()) == []
