"""Downloads from a local server that refuses, truncates, sends another file or resumes; archives with
paths outside their folder.
"""

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mochi.config.datasets import Cifar
from mochi.data.ingest.fetch import Archive, fetch, opened, unpacked
from mochi.errors import DataError
from mochi.storage.atomic import StorageError
from tests import full_disk

CONTENT = bytes(range(256)) * 5000
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/good supports ranges; /plain does not; /cut stops halfway; /wrong is another file."""

    requests: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        if self.path == "/refused":
            self.send_error(403)
            return
        content = b"something else" if self.path == "/wrong" else CONTENT
        first = 0
        if wanted and self.path in {"/good", "/cut"}:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[first:half] if self.path == "/cut" else content[first:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def options(**values: object) -> Cifar:
    return Cifar(source="cifar10", name="c", **values)


def archive(*urls: str) -> Archive:
    return Archive("file.bin", MD5, urls)


def test_the_next_url_is_used_if_the_first_fails(server: str, tmp_path: Path) -> None:
    candidates = archive(f"{server}/refused", f"{server}/wrong", f"{server}/good")
    path = fetch(candidates, options(), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [where for where, _ in Handler.requests] == ["/refused", "/wrong", "/good"]
    assert fetch(candidates, options(), tmp_path) == path
    assert len(Handler.requests) == 3  # kept: nothing was requested again


def test_mirrors_of_the_user_are_tried_first(server: str, tmp_path: Path) -> None:
    fetch(archive(f"{server}/refused"), options(mirrors=[f"{server}/good"]), tmp_path)
    assert [where for where, _ in Handler.requests] == ["/good"]


def test_an_interrupted_download_resumes(server: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="connection lost after 640000 of 1280000 bytes; run again to resume"
    ):
        fetch(archive(f"{server}/cut"), options(), tmp_path)
    path = fetch(archive(f"{server}/good"), options(), tmp_path)
    assert path.read_bytes() == CONTENT
    assert Handler.requests[-1] == ("/good", "bytes=640000-")


def test_without_ranges_a_download_starts_again(server: str, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "file.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(archive(f"{server}/plain"), options(), tmp_path).read_bytes() == CONTENT


def test_a_complete_partial_file_is_used(server: str, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "file.bin.part").write_bytes(CONTENT)
    assert fetch(archive(f"{server}/good"), options(), tmp_path).read_bytes() == CONTENT


def test_if_every_url_fails_all_errors_are_shown(server: str, tmp_path: Path) -> None:
    candidates = archive(f"{server}/refused", f"{server}/wrong", "gopher://x/y", "http://127.0.0.1:9/x")
    with pytest.raises(DataError) as raised:
        fetch(candidates, options(), tmp_path)
    text = str(raised.value)
    for part in (
        "403",
        "found md5",
        "not an http, https or ftp URL",
        "127.0.0.1:9",
        "set dataset.archive",
        MD5,
    ):
        assert part in text


def test_an_archive_that_the_user_downloaded_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.bin"
    with pytest.raises(DataError, match=r"no such file; expected file.bin"):
        fetch(archive(), options(archive=str(path)), tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=rf"found md5 .*; expected {MD5}"):
        fetch(archive(), options(archive=str(path)), tmp_path)
    path.write_bytes(CONTENT)
    assert fetch(archive(), options(archive=str(path)), tmp_path) == path


def test_a_download_larger_than_the_free_space_is_refused(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk.free(2_000_000, monkeypatch)
    with pytest.raises(StorageError, match=r"downloads: found 2.0 MB of free disk space; expected 2.3 MB"):
        fetch(archive(f"{server}/good", f"{server}/plain"), options(), tmp_path)
    assert [where for where, _ in Handler.requests] == ["/good"]
    full_disk.free(2_400_000, monkeypatch)
    assert fetch(archive(f"{server}/good"), options(), tmp_path).read_bytes() == CONTENT


def test_a_full_disk_during_a_download_is_reported_and_the_part_is_kept(
    server: str, tmp_path: Path
) -> None:
    with (
        full_disk.files_of_at_most(500_000),
        pytest.raises(StorageError, match=r"downloads/file.bin.part: cannot be written: File too large"),
    ):
        fetch(archive(f"{server}/good", f"{server}/plain"), options(), tmp_path)
    assert [where for where, _ in Handler.requests] == ["/good"]
    assert fetch(archive(f"{server}/good"), options(), tmp_path).read_bytes() == CONTENT
    assert Handler.requests[-1] == ("/good", "bytes=500000-")


def test_a_full_disk_during_unpacking_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "x.tgz", "a", "b")
    full_disk.free(1 << 20, monkeypatch)  # and 10 bytes are too much
    with pytest.raises(StorageError, match=r"x.tgz: found 1.0 MB of free disk space"):
        unpacked(path, tmp_path)
    monkeypatch.undo()
    with (
        full_disk.files_of_at_most(4),
        pytest.raises(StorageError, match=r"unpacked/x.tgz: cannot be written: File too large"),
    ):
        unpacked(path, tmp_path)
    assert (unpacked(path, tmp_path) / "b").read_bytes() == b"hello"


def make_tar(path: Path, *members: tarfile.TarInfo | str) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            content = b"" if info.linkname else b"hello"
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        "../outside.txt", "a/../../outside.txt", "/outside.txt",
        link("a/up", "../../x"), link("a", "/etc/passwd"), special("pipe", tarfile.FIFOTYPE),
    ],
)  # fmt: skip
def test_an_archive_with_paths_outside_its_folder_is_refused(tmp_path: Path, member) -> None:
    path = make_tar(tmp_path / "evil.tgz", "fine.txt", member)
    with pytest.raises(DataError, match=r"evil.tgz: refused, nothing unpacked"):
        unpacked(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.txt"))
    assert not (tmp_path / "outside.txt").exists()


def test_nothing_is_unpacked_through_a_link(tmp_path: Path) -> None:
    """The link itself is safe, but its target could be changed to anywhere."""
    path = make_tar(tmp_path / "evil.tgz", link("here", "."), "here/file.txt")
    with pytest.raises(DataError, match=r"'here/file.txt' is behind a link"):
        unpacked(path, tmp_path / "cache")


@pytest.mark.parametrize("filters", [True, False])
def test_extraction_with_and_without_tarfile_filters_is_the_same(
    tmp_path: Path, filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:  # before Python 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    path = make_tar(tmp_path / "good.tgz", "a/b.txt", link("a/c.txt", "b.txt"))
    assert (unpacked(path, tmp_path / "cache") / "a" / "c.txt").read_text() == "hello"


def test_a_valid_archive_is_unpacked_once(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "good.tgz", "a/b.txt", link("a/c.txt", "b.txt"))
    folder = unpacked(path, tmp_path / "cache")
    assert (folder / "a" / "c.txt").read_text() == "hello"
    (folder / "a" / "b.txt").unlink()
    assert not (unpacked(path, tmp_path / "cache") / "a" / "b.txt").exists()  # not extracted again
    (folder / ".complete").unlink()
    assert (
        unpacked(path, tmp_path / "cache") / "a" / "b.txt"
    ).exists()  # an interrupted extraction is repeated


@pytest.mark.parametrize("content", [b"", b"no archive", "cut"])
def test_a_file_that_is_not_an_archive_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = make_tar(tmp_path / "x.tgz", *(f"{n}.txt" for n in range(50)))
    path.write_bytes(path.read_bytes()[:200] if isinstance(content, str) else content)
    message = r"x.tgz: found no complete tar archive \([^\n]*\); download it again$"
    with pytest.raises(DataError, match=message), opened(path) as file:
        file.getmembers()
