"""Find the image files of a folder, for preparation, inspection and detection.

Files of systems, editors and this program are ignored and counted; `decode` identifies the others by
content.
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mochi.text import nfc, read_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif")
"""Suffixes in search order; case does not matter."""

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Folder name, in any case -> split; without a `val` the `test` images are `val`, for evaluations."""

_OTHER_SUFFIXES = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".yaml", ".yml", ".html", ".pdf", ".py",
    ".ipynb", ".sh", ".ini", ".mat", ".npy", ".npz", ".pkl", ".h5", ".parquet", ".zip", ".tar", ".gz",
    ".tgz", ".7z", ".rar", ".log", ".out", ".err", ".mp4", ".mov", ".avi", ".mkv", ".webm",
    ".arrow", ".safetensors", ".pt", ".pth", ".ckpt", ".onnx", ".lock", ".dvc", ".tfrecord", ".mdb",
    ".aae", ".xmp", ".thm", ".lrv",  # of phones and cameras, next to photos and videos
    ".m4v", ".3gp", ".mpg", ".mpeg", ".mts", ".wmv", ".mp3", ".m4a", ".wav",
    ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".rtf", ".odt", ".rst", ".tex", ".toml", ".cfg",
    ".db", ".info", ".lnk", ".url", ".nfo", ".md5", ".sha1", ".sha256", ".sfv", ".torrent", ".exe",
    ".bz2", ".xz", ".zst", ".js", ".css", ".names", ".weights",
)  # fmt: skip
_OTHER_NAMES = {
    "readme", "license", "licence", "copying", "authors", "changelog", "makefile", "dockerfile",
    "checksums", "md5sum", "md5sums", "sha256sum", "sha256sums",
}  # fmt: skip

_SYSTEM = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "icon\uf00d",
    "$recycle.bin", "recycler", "system volume information",  # Windows
    "__macosx", "network trash folder", "temporary items",  # macOS
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp",  # Synology, QNAP
    "lost+found", "lost.dir", "~snapshot", "__pycache__",
}  # fmt: skip
# chkdsk, Netatalk, Synology
_SYSTEM_FORM = re.compile(r"found\.\d{3}|:2e.*|.*@syno(eastream|resource)", re.S)
_STREAM = re.compile(
    r".*zone\.identifier(:\$data)?|.*:(com\.dropbox\.attributes|afp_afpinfo|afp_resource)(:\$data)?", re.S
)
_COLONS = str.maketrans("\uf03a\uf022", "::")
"""Characters that WSL and Samba write instead of a colon, which Windows does not allow in names."""
_PARTIAL = "part|partial|filepart|crdownload|opdownload|download|aria2|!ut"
_BACKUP = re.compile(rf".*(~|\.(bak|swp|swo|swn|orig|rej|old|tmp|{_PARTIAL}))|#.*#", re.S)
_RECORD = "provenance.json"
BROKEN = "broken link or not a regular file"
"""Reason for which a file is ignored, though it may stand for an image."""
_VOC_MASKS = {"SegmentationClass", "SegmentationObject"}


def left_behind(name: str) -> str | None:
    """Why a file or folder of this name is ignored; None for all others."""
    lower = name.lower().translate(_COLONS)
    if name.startswith(".") or lower in _SYSTEM or _SYSTEM_FORM.fullmatch(lower) or _is_stream(lower):
        return "hidden or system file"
    if _BACKUP.fullmatch(lower):
        return "editor backup or partial copy"
    return None


def _is_stream(lower: str) -> bool:
    """Whether a name is that of an alternate data stream, which NTFS keeps inside a file."""
    file, _, stream = lower.partition(":")
    of_file = stream and file.endswith((*IMAGE_SUFFIXES, ".db")) and not stream.endswith(IMAGE_SUFFIXES)
    return bool(of_file or _STREAM.fullmatch(lower))


def is_ours(folder: Path) -> bool:
    """Whether this program wrote a folder: prepared data, results."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"settings", "code_digest", "outputs"} <= record.keys()


def walk(root: Path, ignored: Counter[str] | None = None) -> list[str]:
    """Sorted paths, relative to `root`, of every file below it that may be an image.

    Names in `left_behind`, folders that this program wrote, other types, broken links and loops are skipped
    and counted in `ignored`. `root` may contain its own prepared data.
    """
    return sorted(_walk(root, "", (), Counter() if ignored is None else ignored))


def _walk(
    root: Path, below: str, parents: tuple[tuple[int, int], ...], ignored: Counter[str]
) -> Iterator[str]:
    """Paths of candidate images, relative to `root`; `parents` are the folders above, to detect loops."""
    folder = root / below
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        ignored["link back to a folder above"] += 1
        return
    with os.scandir(folder) as scan:
        entries = list(scan)
    if below and any(entry.name == _RECORD for entry in entries) and is_ours(folder):
        ignored["folder of results or prepared data"] += 1
        return
    if any(entry.name == "JPEGImages" for entry in entries):  # a VOC tree
        entries = [entry for entry in entries if entry.name not in _VOC_MASKS]
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if reason := left_behind(entry.name):
            ignored[reason] += 1
        elif _is_loop(entry):
            ignored[BROKEN] += 1
        elif entry.is_dir():
            yield from _walk(root, path, (*parents, identity), ignored)
        elif not entry.is_file():
            ignored[BROKEN] += 1
        elif entry.name.lower().endswith(_OTHER_SUFFIXES):
            ignored["not an image by its suffix"] += 1
        elif entry.name.lower() in _OTHER_NAMES:
            ignored["not an image by its name"] += 1
        else:
            yield path


def _is_loop(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is one of links that end at each other, on which `is_dir` raises."""
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True
    return False


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the subfolders that may contain images."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not left_behind(entry.name) and entry.is_dir() and not is_ours(entry)
    )


_MARKED = re.compile(r"(.*\S)\s+(-1|0|1)", re.S)


def read_list(path: Path, exists: Callable[[str], bool]) -> list[str]:
    """The names in a text file with one image per line: VOC's image sets and similar lists.

    Names may contain spaces. In VOC's class-wise lists a last column of -1, 0 or 1 says whether the class
    is in the image; -1 skips it. If both interpretations are possible, `exists` decides.

    Raises:
        DataError: as `read_lines`.
    """
    names = []
    for line in map(nfc, read_lines(path, "a list of images, one name per line")):
        marked = _MARKED.fullmatch(line)
        if marked is None or exists(line):
            names.append(line)
        elif marked[2] != "-1":
            names.append(marked[1])
    return names


class Names:
    """The files of a folder by name, in whichever Unicode form and with whichever suffix they have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, dict[str, str]] = {}
        """Subfolder -> composed name -> name."""

    def find(self, name: str) -> Path | None:
        """The file of this name, which may be in a subfolder; None if there is none."""
        below, _, base = name.rpartition("/")
        found = self._names(below).get(nfc(base))
        return None if found is None else self.folder / below / found

    def image(self, stem: str) -> Path | None:
        """The image of this name without suffix."""
        for suffix in IMAGE_SUFFIXES:
            for spelled in (suffix, suffix.upper(), suffix.title()):
                if found := self.find(f"{stem}{spelled}"):
                    return found
        return None

    def alike(self, name: str) -> str:
        """For a message: the file whose name, suffix or not, differs in case, or only in its suffix."""
        below, _, base = name.rpartition("/")
        base, other = nfc(base), ""
        for entry, own in self._names(below).items():
            stem, _, suffix = entry.rpartition(".")
            if base == stem and suffix.islower():
                other = f"; found {own!r}, which has another suffix"
            elif base != entry and base.casefold() in {entry.casefold(), stem.casefold()}:
                return f"; found {own!r}, which differs in case"
        return other

    def _names(self, below: str) -> dict[str, str]:
        if below not in self._listed:
            try:
                names = sorted(entry.name for entry in (self.folder / below).iterdir())
            except (OSError, ValueError):  # no such folder, or none that can exist
                names = []
            self._listed[below] = {nfc(name): name for name in names if left_behind(name) is None}
        return self._listed[below]
