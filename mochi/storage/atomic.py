"""Atomic writes: under a temporary name, flushed to disk, then renamed.

The temporary name contains host and process id. The next writer of the same file on that host removes
what a killed writer left; files of other hosts stay.
"""

import csv
import errno
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from mochi.errors import UserError

_LAST = "provenance.json"

_REMEDIES = {
    errno.ENOSPC: "free disk space there (or inodes: see `df -i`)",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount its file system again",
    errno.ENOENT: "find out what removed its folder",
    errno.EEXIST: "a file has the name of its folder: choose another",
    errno.ENOTDIR: "a file has the name of its folder: choose another",
    errno.EISDIR: "a folder has this name: choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_MARGIN = 1 << 20
"""Bytes for tables, records and overhead of the file system."""

_umask_lock = threading.Lock()


class StorageError(UserError, OSError):
    """Files that cannot be written; existing files are intact."""


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Explain why `path`, or another file in its folder, cannot be written.

    Raises:
        StorageError: instead of an OSError or SafetensorError of writing there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            number, file = error.errno, error.filename2 or error.filename  # copies and renames have both
        else:
            found = re.search(r"\(os error (\d+)\)", str(error))
            number, file = int(found[1]) if found else None, None
        if number not in _REMEDIES or not Path(os.fsdecode(file or path)).is_relative_to(path.parent):
            raise
        target = Path(*(part for part in path.parts if not part.startswith(".publishing.")))
        raise StorageError(
            f"{target}: cannot be written: {os.strerror(number)}; {_REMEDIES[number]}, then run the same "
            "command again; existing files are intact"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed.

    An existing file at `path` stays intact until the new one is complete on disk. The new one
    gets the mode of the umask.

    Raises:
        StorageError: the disk is full or the folder read-only; `path` is unchanged.
    """
    temporary = _temporary(path)
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _complete(temporary)
            temporary.replace(path)
            _flush_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    _remove_abandoned(path)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success its files replace those of the same names in `folder`.

    Until all files are complete on disk nothing in `folder` changes. They are moved by renames,
    provenance.json last, because it has the checksums of the others. After a kill between the renames, the
    old provenance.json does not match the files, so the result counts as stale. Other files in `folder`
    stay.

    Raises:
        StorageError: the disk is full or the folder read-only.
    """
    # Inside `folder`, which may be a link to another file system, across which nothing can be renamed.
    temporary, last = _temporary(folder / "publishing"), _temporary(folder / _LAST)
    with explaining(folder / _LAST):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder / "publishing")
        _remove_abandoned(folder / _LAST)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this id before
        temporary.mkdir()
        try:
            yield temporary
            files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
            files.sort(key=lambda file: (file == Path(_LAST), file))
            for file in files:
                _complete(temporary / file)
            for file in files:
                target = last if file == Path(_LAST) else folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                (temporary / file).replace(target)
                _flush_folder(target.parent)
            shutil.rmtree(temporary)
            if Path(_LAST) in files:
                last.replace(folder / _LAST)
                _flush_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                last.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order; file names that are not UTF-8 stay readable."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode())


def write_rows(path: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically; missing cells are empty."""
    rows = list(rows)
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def require_writable(folder: Path) -> None:
    """Create `folder` and check that it is writable, before hours of computing.

    Raises:
        UserError: it cannot be created or written.
    """
    probe = _temporary(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: results cannot be written there: {error.strerror}; "
            "expected a folder that this user may write: choose another with --out or change its mode"
        ) from None


def require_writable_file(path: Path) -> None:
    """Create the folder of `path` and check that a file of this name can be written, before computing.

    Raises:
        StorageError: it cannot; an existing file is unchanged.
    """
    with explaining(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path)
        probe.touch()
        probe.unlink()


class Space(NamedTuple):
    """Bytes that are needed in folders of one file system, and those that are free there."""

    folders: list[Path]
    needed: int
    free: int

    def shortage(self) -> str | None:
        """A message if too little is free."""
        if self.free >= self.needed:
            return None
        return (
            f"{', '.join(map(str, self.folders))}: found {readable_size(self.free)} of free disk space; "
            f"expected {readable_size(self.needed)}; free some, or link the folder to another disk, then "
            "run the same command again"
        )


def disk_space(needed: Mapping[Path, int]) -> list[Space]:
    """Group folders by file system: folders of one file system share its space.

    Args:
        needed: folder, which need not exist -> bytes; a mebibyte is added for tables and records.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(nearest_existing(folder).stat().st_dev, []).append(folder)
    return [
        Space(
            folders,
            sum(needed[folder] for folder in folders) + _MARGIN,
            shutil.disk_usage(nearest_existing(folders[0])).free,
        )
        for folders in disks.values()
    ]


def require_space(needed: Mapping[Path, int]) -> None:
    """Check that there is enough disk space, before hours of computing.

    Args:
        needed: as in `disk_space`.

    Raises:
        StorageError: less is free.
    """
    for space in disk_space(needed):
        if (text := space.shortage()) is not None:
            raise StorageError(text)


def readable_size(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of dead writers of `path` on this host, if possible."""
    prefix = f".{path.name}.{socket.gethostname()}."
    with os.scandir(path.parent) as entries:
        left = [entry for entry in entries if entry.name.startswith(prefix)]
    for entry in left:
        found = re.fullmatch(r"(\d{1,9})\.tmp", entry.name.removeprefix(prefix))
        if found is None or _is_alive(int(found[1])):
            continue
        with suppress(OSError):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                Path(entry).unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _complete(path: Path) -> None:
    """Give a file the mode of the umask, and wait until its bytes are on disk."""
    # Some writers make private files (safetensors). A hard link may be to another user's file.
    with suppress(PermissionError):
        path.chmod(0o666 & ~_umask())
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Wait until renames in a folder are on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    with _umask_lock:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
