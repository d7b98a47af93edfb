"""Your own images: `train/<class>/*`, `val/<class>/*`, `<class>/*`, or any tree without labels."""

import hashlib
import json
import logging
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from mochi.config.datasets import Dataset, Folder
from mochi.data.format import UNLABELLED
from mochi.data.ingest import classes
from mochi.data.ingest.files import SPLITS, read_list, subfolders, walk
from mochi.data.ingest.raw import ByteRange, FileSplit, RawDataset, as_text, no_folder
from mochi.errors import DataError
from mochi.text import nfc

logger = logging.getLogger(__name__)

UNLABELLED_FOLDERS = ("unlabeled", "unlabelled")


def collect(config: Folder, cache: Path) -> RawDataset:
    """List the images below `config.path`.

    Raises:
        DataError: as `list_images`, or the classes of train and val contradict each other.
    """
    del cache  # nothing is downloaded
    raw = list_images(config)
    counts = raw.class_counts()
    for fault in classes.faults(counts):
        raise DataError(f"{as_text(config.path)}: {fault}")
    for oddity in classes.oddities(counts):
        logger.warning("%s: %s", as_text(config.path), oddity)
    return raw


def list_images(config: Folder) -> RawDataset:
    """List the images below `config.path`.

    A folder with `train` in it has splits; below a split, the first level of folders are the classes, and
    images outside any class, or in `unlabeled/`, have no label. Any other folder is one split `train`, with
    the first level of folders as classes if `class_folders` is set. Links are followed, except those back
    to a parent folder.

    Raises:
        DataError: no such folder, list or image in it, or images to test on but none to train on.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"{no_folder(root)}; give the folder of your images (dataset.path)")
    ignored: Counter[str] = Counter()
    paths = walk(root, ignored)
    top = subfolders(root)
    if flat := [path for path in paths if "\\" in path]:
        logger.warning(
            "%s: %d names contain a backslash, such as %s: unpack the archive again, with folders",
            as_text(str(root)), len(flat), as_text(flat[0]),
        )  # fmt: skip
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
        deeper = _splits_below(paths)
        logger.warning(
            "%s: no train folder in it, so all images are one split without labels; %s",
            as_text(str(root)),
            f"{as_text(str(root / deeper))} has one: give that folder to have classes"
            if deeper
            else as_text(
                f"if its folders ({', '.join(top[:3])}{', ...' if len(top) > 3 else ''}) are classes, set "
                "class_folders: true and val_share, or put them under train/ and val/"
            ),
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
    if not splits.get("train"):
        others = ", ".join(f"{len(rows)} in {split}" for split, rows in splits.items() if rows)
        raise DataError(
            f"{as_text(str(root))}: found 0 images in train, {others}; put the training images into "
            f"{as_text(str(root / 'train'))}; ignored: {dict(ignored) or 'nothing'}"
        )
    names = _classes(root, top, splits, has_splits=has_splits)
    number = {name: label for label, name in enumerate(names)}
    return RawDataset(
        source=f"folder {as_text(root.name)}",
        licence="unknown: your own images",
        classes=[as_text(name) for name in names],
        splits={split: _file_split(root, rows, number) for split, rows in splits.items()},
        ignored=dict(ignored),
        listing=listing(config),
        max_unreadable=config.max_unreadable,
        max_side=config.max_side,
    )


def _splits_below(paths: list[str]) -> str | None:
    """The first folder below the root, relative to it, that has both train and val or test in it."""
    found: dict[str, set[str]] = {}
    for path in paths:
        folders = path.split("/")[:-1]
        for depth, name in enumerate(folders):
            if depth and (split := SPLITS.get(name.lower())):
                found.setdefault("/".join(folders[:depth]), set()).add(split)
    return next((folder for folder, splits in found.items() if "train" in splits and len(splits) > 1), None)


def listing(config: Folder) -> str:
    """Digest of the paths of all images below `config.path` and of the lists; no image is opened."""
    root = Path(config.path)
    digest = hashlib.sha256(os.fsencode("\n".join(walk(root))))
    for file in config.only_listed:
        with suppress(OSError):  # reported by `list_images`
            digest.update((root / file).read_bytes())
    return digest.hexdigest()[:16]


def _listed(root: Path, paths: list[str], lists: list[str], ignored: Counter[str]) -> list[str]:
    """The paths that are in the lists."""
    forms = [{nfc(form) for form in (path, *_base_and_stem(path))} for path in paths]
    known = set().union(*forms)
    names = {name for file in lists for name in read_list(root / file, known.__contains__)}
    kept = [path for path, own in zip(paths, forms, strict=True) if not names.isdisjoint(own)]
    if missing := sorted(names - known):
        logger.warning(
            "%s: %d names of dataset.only_listed have no image, such as %s",
            as_text(str(root)), len(missing), as_text(repr(missing[0])),
        )  # fmt: skip
    ignored["not in the lists of dataset.only_listed"] += len(paths) - len(kept)
    return kept


def _base_and_stem(path: str) -> tuple[str, str]:
    base = path.rpartition("/")[2]
    return base, base.rpartition(".")[0] or base


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
        labelled = class_folders and len(parts) > 1 and not _no_class(parts[0])
        return "train", parts[0] if labelled else None
    if _no_class(parts[0]):
        return "train", None
    split = SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
    labelled = len(parts) > 2 and not _no_class(parts[1])
    return split, parts[1] if labelled else None


def _classes(
    root: Path, top: list[str], splits: dict[str, list[tuple[str, str | None]]], *, has_splits: bool
) -> list[str]:
    """Names of the class folders of every split, including empty ones, so that numbers are stable."""
    if not any(name for rows in splits.values() for _, name in rows):
        return []
    below = [root / folder for folder in top if folder.lower() in SPLITS] if has_splits else [root]
    spelled = {name for folder in below for name in subfolders(folder) if not _no_class(name)}
    if twice := sorted(name for name in spelled if nfc(name) != name and nfc(name) in spelled):
        logger.warning(
            "%s: one class each, though its folders are spelled in two Unicode forms: %s",
            as_text(str(root)), as_text(", ".join(twice)),
        )  # fmt: skip
    return sorted({nfc(name) for name in spelled})


def _no_class(name: str) -> bool:
    return name.lower() in UNLABELLED_FOLDERS


def _file_split(root: Path, rows: list[tuple[str, str | None]], number: dict[str, int]) -> FileSplit:
    labels = [UNLABELLED if name is None else number[nfc(name)] for _, name in rows]
    ranges = [ByteRange(f"{root}{os.sep}{path}") for path, _ in rows]  # a Path takes ten times as long
    return FileSplit(ranges, [path for path, _ in rows], np.array(labels, dtype=np.int64))


def current_listing(dataset: Dataset, prepared: Path) -> str:
    """Digest of the names of a user's own images, as `listing`; "" for a source that is not a folder.

    If the images do not exist, as in a clone with only the prepared data: the digest that was recorded when
    they were prepared.
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
