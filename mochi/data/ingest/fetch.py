"""Download archives once, from several URLs, with resume and checksums, and open them safely."""

import hashlib
import http.client
import logging
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mochi.config.datasets import Download
from mochi.errors import DataError
from mochi.storage.atomic import StorageError, explaining, require_space, write_text

logger = logging.getLogger(__name__)
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Archive:
    """A published archive: its file name, checksum and URLs."""

    file: str
    md5: str
    urls: tuple[str, ...]


def fetch(archive: Archive, options: Download, cache: Path) -> Path:
    """The archive as a file: the user's, an earlier download, or a download from the first URL that serves
    the right bytes. An interrupted download is resumed.

    Raises:
        DataError: the user's file is not the archive, or no URL serves it.
        StorageError: `cache` cannot be written, or has too little space.
    """
    if options.archive is not None:
        return _user_supplied(archive, Path(options.archive))
    target = cache / "downloads" / archive.file
    if target.is_file() and _md5(target) == archive.md5:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in (*options.mirrors, *archive.urls):
        part = target.with_name(f"{target.name}.part")
        try:
            _download(url, part)
        except StorageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
            logger.warning("%s: %s; trying the next URL", url, error)
            continue
        found = _md5(part)
        if found == archive.md5:
            part.replace(target)
            return target
        part.unlink()
        failures.append(f"{url}: found md5 {found}; expected {archive.md5}")
        logger.warning("%s: a different file (md5 %s); trying the next URL", url, found)
    raise DataError(
        f"{archive.file}: no URL serves it:\n  "
        + "\n  ".join(failures)
        + f"\ndownload it yourself (md5 {archive.md5}) and set dataset.archive to its path"
    )


def _user_supplied(archive: Archive, path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"archive: {path}: no such file; expected {archive.file} (md5 {archive.md5})")
    found = _md5(path)
    if found != archive.md5:
        raise DataError(
            f"archive: {path}: found md5 {found}; expected {archive.md5} ({archive.file}); "
            "the file is truncated or a different one: download it again"
        )
    return path


def _download(url: str, part: Path) -> None:
    """Download `url` into `part`, continuing after the existing bytes."""
    if not url.startswith(("http://", "https://", "ftp://")):
        raise ValueError("not an http, https or ftp URL")
    present = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mochi", **({"Range": f"bytes={present}-"} if present else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the scheme is checked above
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and present:
                return  # the part is complete; the checksum decides
            raise
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        expected = answer.headers.get("Content-Length")
        logger.info("%s: %s bytes%s", url, expected or "unknown", f", from {present}" if resumed else "")
        if expected is not None:
            require_space({part.parent: int(expected)})
        received = 0
        with explaining(part), part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                received += len(block)
    if expected is not None and received < int(expected):
        raise OSError(f"connection lost after {received} of {expected} bytes; run again to resume")


def _md5(path: Path) -> str:
    # The publishers' checksum: against truncated and wrong files, not against forgery.
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, compressed or not, whose members are all inside the target folder.

    Raises:
        DataError: not a tar archive, truncated, or a member points outside.
    """
    try:
        with tarfile.open(path) as archive:
            links: set[PurePosixPath] = set()
            for member in archive:
                fault = _fault(member, links)
                if fault:
                    raise DataError(f"{path}: refused, nothing unpacked: {member.name!r} {fault}")
            yield archive
    except (tarfile.TarError, EOFError) as error:
        # tarfile adds a line for each compression.
        reason = (str(error).splitlines() or [""])[0].rstrip(":")
        raise DataError(f"{path}: found no complete tar archive ({reason}); download it again") from None


def _fault(member: tarfile.TarInfo, links: set[PurePosixPath]) -> str | None:
    """Why a member must not be unpacked; None for a safe one. `links` collects symbolic links.

    tarfile's own filters came with Python 3.11.4, and Debian 12 has 3.11.2. These rules are stricter:
    nothing is unpacked through a link, and no link target contains "..".
    """
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return "is outside the folder"
    if links.intersection(name.parents):
        return "is behind a link"
    if member.issym():
        links.add(name)
    if member.issym() or member.islnk():
        target = PurePosixPath(member.linkname)
        return "points outside the folder" if target.is_absolute() or ".." in target.parts else None
    return None if member.isfile() or member.isdir() else "is neither file, folder nor link"


def unpacked(path: Path, cache: Path) -> Path:
    """The folder with the archive's contents, unpacked once; after an interruption, from the start."""
    folder = cache / "unpacked" / path.name
    done = folder / ".complete"
    if not done.is_file():
        with opened(path) as archive, explaining(folder):
            require_space({folder: sum(member.size for member in archive.getmembers())})
            if hasattr(tarfile, "data_filter"):
                archive.extractall(folder, filter="data")
            else:
                archive.extractall(folder)  # noqa: S202 (each member was checked)
        write_text(done, f"{path.stat().st_size}\n")
    return folder
