"""Your own images: `train/<class>/*`, `val/<class>/*`, `<class>/*`, or any tree without labels."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mochi.config.datasets import Dataset, Folder
from mochi.data.format import UNLABELLED
from mochi.data.ingest.raw import ByteRange, FileSplit, RawDataset, as_text
from mochi.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder name, in any case -> split; without a `val` the `test` images are `val`, for evaluations."""
UNLABELLED_FOLDERS = ("unlabeled", "unlabelled")

_JUNK_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}
_OTHER_SUFFIXES = (
    ".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".yaml", ".yml", ".html", ".pdf", ".py", ".ipynb",
    ".mat", ".npy", ".npz", ".zip", ".tar", ".tgz", ".log", ".mp4", ".mov", ".avi", ".mkv", ".webm",
)  # fmt: skip


def collect(config: Folder, cache: Path) -> RawDataset:
    """List the images below `config.path`. Raises as `list_images`."""
    del cache  # nothing is downloaded
    return list_images(config)


def list_images(config: Folder) -> RawDataset:
    """List the images below `config.path`.

    A folder holding `train` has splits; below a split, the first level of folders are the classes, and
    images outside any class, or in `unlabeled/`, carry no label. Anything else is one split `train`, with
    the first level of folders as classes where `class_folders` says so. Links are followed, except those
    back to a folder above.

    Raises:
        DataError: no such folder, list or image in it, or images to test on but none to train on.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set dataset.path to the folder of your images")
    ignored: Counter[str] = Counter()
    paths = walk(root, ignored)
    top = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _is_junk(entry.name))
    found = {SPLITS[name.lower()] for name in top if name.lower() in SPLITS}
    if found and "train" not in found:
        raise DataError(
            f"{root}: found {', '.join(top)}, but no train folder; put the training images into "
            f"{root / 'train'}/<class>/ (or {root / 'train'} without labels)"
        )
    has_splits = bool(found)
    if config.only_listed:
        paths = _listed(root, paths, config.only_listed, ignored)
    if top and not has_splits and not config.class_folders:
        logger.warning(
            "%s: no train folder in it, so all images are one split without labels; "
            "if its folders (%s) are classes, set class_folders: true and val_share, or put them under "
            "train/ and val/",
            as_text(str(root)),
            as_text(", ".join(top[:3]) + (", ..." if len(top) > 3 else "")),
        )
    splits: dict[str, list[tuple[str, str | None]]] = {}
    for path in paths:
        split, name = _place(path, has_splits=has_splits, class_folders=config.class_folders)
        if split is None:
            ignored["outside train, val and test"] += 1
        else:
            splits.setdefault(split, []).append((path, name))
    if "val" not in splits and "test" in splits:
        splits["val"] = splits.pop("test")
    if "val" not in splits and config.val_share is not None:
        train, val = _split_off(splits.get("train", []), config.val_share)
        splits |= {"train": train, **({"val": val} if val else {})}
    if not any(splits.values()):
        raise DataError(
            f"{root}: found 0 images; expected files of any image type in train/<class>/, val/<class>/ or "
            f"anywhere below; ignored: {dict(ignored) or 'nothing'}"
        )
    classes = _classes(root, top, splits, has_splits=has_splits)
    number = {name: label for label, name in enumerate(classes)}
    return RawDataset(
        source=f"folder {as_text(root.name)}",
        licence="unknown: your own images",
        classes=[as_text(name) for name in classes],
        splits={split: _file_split(root, rows, number) for split, rows in splits.items()},
        ignored=dict(ignored),
        listing=listing(config),
        max_unreadable=config.max_unreadable,
    )


def listing(config: Folder) -> str:
    """Digest of the paths of all images below `config.path` and of the lists; no image is opened."""
    root = Path(config.path)
    digest = hashlib.sha256(os.fsencode("\n".join(walk(root))))
    for file in config.only_listed:
        digest.update((root / file).read_bytes())
    return digest.hexdigest()[:16]


def _listed(root: Path, paths: list[str], lists: list[str], ignored: Counter[str]) -> list[str]:
    """The paths that the lists name."""
    names: set[str] = set()
    for file in lists:
        try:
            lines = (root / file).read_bytes().splitlines()
        except OSError as error:
            raise DataError(
                f"dataset.only_listed: {root / file}: cannot be read: {error.strerror}; expected a text "
                "file with one image a line"
            ) from None
        for line in map(os.fsdecode, lines):
            # Class-wise lists of VOC carry a second column, -1 where the class is absent.
            name, _, mark = line.strip().rpartition(" ")
            if mark not in {"-1", "0", "1"} or not name:
                names.add(line.strip())
            elif mark != "-1":
                names.add(name.strip())
    kept = []
    for path in paths:
        base = path.rpartition("/")[2]
        if not names.isdisjoint({path, base, base.rpartition(".")[0]} - {""}):
            kept.append(path)
    ignored["not in the lists of dataset.only_listed"] += len(paths) - len(kept)
    return kept


def _split_off(
    rows: list[tuple[str, str | None]], share: float
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """(train, val): of every class the share whose paths have the smallest digests, in the old order."""
    of_class: dict[str | None, list[str]] = {}
    for path, name in rows:
        of_class.setdefault(name, []).append(path)
    val: set[str] = set()
    for name, paths in of_class.items():
        if name is not None and len(paths) > 1:
            count = min(max(round(share * len(paths)), 1), len(paths) - 1)
            val.update(sorted(paths, key=_digest)[:count])
    train = [row for row in rows if row[0] not in val]
    return train, [row for row in rows if row[0] in val]


def _digest(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(path)).digest()


def _place(path: str, *, has_splits: bool, class_folders: bool) -> tuple[str | None, str | None]:
    """(split, class or None) of a path such as `train/daisy/1.jpg`."""
    parts = path.split("/")
    if not has_splits:
        labelled = class_folders and len(parts) > 1 and parts[0] not in UNLABELLED_FOLDERS
        return "train", parts[0] if labelled else None
    if parts[0] in UNLABELLED_FOLDERS:
        return "train", None
    split = SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
    labelled = len(parts) > 2 and parts[1] not in UNLABELLED_FOLDERS
    return split, parts[1] if labelled else None


def _classes(
    root: Path, top: list[str], splits: dict[str, list[tuple[str, str | None]]], *, has_splits: bool
) -> list[str]:
    """Names of the class folders of every split, the empty ones too, so that numbers stay stable."""
    if not any(name for rows in splits.values() for _, name in rows):
        return []
    if not has_splits:
        return [name for name in top if name not in UNLABELLED_FOLDERS]
    names = {
        entry.name
        for folder in top
        if folder.lower() in SPLITS
        for entry in os.scandir(root / folder)
        if entry.is_dir() and not _is_junk(entry.name) and entry.name not in UNLABELLED_FOLDERS
    }
    return sorted(names)


def _file_split(root: Path, rows: list[tuple[str, str | None]], number: dict[str, int]) -> FileSplit:
    labels = [UNLABELLED if name is None else number[name] for _, name in rows]
    ranges = [ByteRange(f"{root}{os.sep}{path}") for path, _ in rows]  # a Path takes ten times as long
    return FileSplit(ranges, [path for path, _ in rows], np.array(labels, dtype=np.int64))


def current_listing(dataset: Dataset, prepared: Path) -> str:
    """Digest of the names of a user's own images, as `listing`; "" for a source that is not a folder.

    Where the images are not, as in a clone that holds the prepared data alone: as they were when they
    were prepared.
    """
    if not isinstance(dataset, Folder):
        return ""
    if Path(dataset.path).is_dir():
        return listing(dataset)
    try:
        record = json.loads((prepared / "provenance.json").read_text(encoding="utf-8"))
        return str(record["settings"]["listing"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK_NAMES


def walk(root: Path, ignored: Counter[str] | None = None) -> list[str]:
    """Sorted paths, relative to `root`, of every file below it that may be an image.

    Hidden and system files, other types, broken links and loops are left out and counted in `ignored`.
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
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if _is_junk(entry.name):
                ignored["hidden or system file"] += 1
            elif entry.is_dir():
                yield from _walk(root, path, (*parents, identity), ignored)
            elif not entry.is_file():
                ignored["broken link or not a regular file"] += 1
            elif entry.name.lower().endswith(_OTHER_SUFFIXES):
                ignored["not an image by its suffix"] += 1
            else:
                yield path
