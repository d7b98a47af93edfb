"""Recognise a folder of images: classes with or without splits, unlabelled photos, a VOC or COCO tree."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mochi.config.datasets import Folder
from mochi.data.ingest import decode
from mochi.data.ingest.files import SPLITS, subfolders, walk
from mochi.data.ingest.raw import FileSplit, RawDataset, as_text, class_counts, no_folder
from mochi.data.ingest.sources.folder import UNLABELLED_FOLDERS, list_images
from mochi.errors import DataError

logger = logging.getLogger(__name__)

VAL_SHARE = 0.2
_DATE = re.compile(r"(19|20)\d\d([-_.]?\d\d){0,2}")  # names of albums by cameras and people
_OTHER_BOXES = (  # of Roboflow, Label Studio, labelImg, YOLO
    "_annotations.coco.json", "*/_annotations.coco.json", "result.json", "*.xml", "*/*.xml",
    "labels/*.txt", "labels/*/*.txt", "*/labels/*.txt",
)  # fmt: skip
_SAMPLE = 400  # images whose headers are read


@dataclass(frozen=True)
class Description:
    """A folder, as needed for an experiment."""

    kind: Literal["classes", "photos", "voc", "coco"]
    dataset: dict[str, Any]
    """The images to pretrain on: keys of `dataset` besides source and name."""
    files: list[str]
    """Paths of the training images."""
    train_classes: dict[str, int] = field(default_factory=dict)
    """Labelled training images of each class."""
    val_classes: dict[str, int] = field(default_factory=dict)
    unlabelled_val: int = 0
    """Validation images without a class."""
    detection: dict[str, Any] = field(default_factory=dict)
    """Keys of a detection set's `data`; empty without boxes."""


def describe(folder: Path) -> Description:
    """Read only names, except for the lists of a VOC tree.

    Raises:
        DataError: no such folder, no image, a VOC or COCO tree without a part to test on, or a path that
            cannot be written to an experiment file.
    """
    if not folder.is_dir():
        raise DataError(f"{no_folder(folder)}; give the folder of your images")
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{as_text(str(folder))}: the path is not UTF-8, as experiment files require; "
            "rename the folder or give a link to it"
        ) from None
    return _coco(folder) or _voc(folder) or _images(folder)


def detection_data(folder: Path) -> dict[str, Any]:
    """Keys of a detection set's `data` for a VOC or COCO tree.

    Empty for a folder without boxes, or if the training and test splits are ambiguous.
    """
    try:
        description = _coco(folder) or _voc(folder)
    except DataError:
        return {}
    return {} if description is None else description.detection


def list_folder(folder: Path) -> tuple[dict[str, Any], RawDataset]:
    """The images of a folder, and the keys of `dataset` with which they are read: what `mochi init` writes.

    The images of a VOC or COCO tree are one split without labels.

    Raises:
        DataError: no such folder, or no image in it.
    """
    options: dict[str, Any] = {"path": str(folder)}
    without_boxes = folder.is_dir() and not _has_boxes(folder)
    if without_boxes:
        _warn_of_other_boxes(folder)
    top = subfolders(folder) if without_boxes else []
    if top and not any(name.lower() in SPLITS for name in top) and _are_classes(folder, top):
        options["class_folders"] = True
    raw = _listed(options)
    if "val" not in raw.splits and (raw.splits["train"].labels >= 0).any():
        raw = _listed(options := {**options, "val_share": VAL_SHARE})
    return options, raw


def sides(files: Sequence[str]) -> NDArray[np.int64]:
    """(n, 2) height and width, upright, of evenly spaced files, without unreadable ones."""
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, _SAMPLE).astype(int))]
    sizes = []
    for file in chosen:
        try:
            width, height = decode.image_size(Path(file))
            sizes.append((height, width))
        except decode.UnreadableError:
            continue
    if not sizes:
        raise DataError(
            f"{files[0]}: not an image, and neither are {len(chosen) - 1} others; expected images"
        )
    return np.array(sizes, dtype=np.int64)


def _images(folder: Path) -> Description:
    """Classes below train and val, classes without splits, or photos without labels."""
    options, raw = list_folder(folder)
    train = _files(raw)
    counts = {
        name: {label: count for label, count in class_counts(split.labels, raw.classes).items() if count}
        for name, split in raw.splits.items()
    }
    return Description(
        "classes" if counts["train"] else "photos", options, train, counts["train"], counts.get("val", {}),
        int((raw.splits["val"].labels < 0).sum()) if "val" in raw.splits else 0,
    )  # fmt: skip


def _listed(options: dict[str, Any]) -> RawDataset:
    return list_images(Folder(source="folder", name="x", **options))


def _warn_of_other_boxes(folder: Path) -> None:
    """Say that boxes are not read, if a labelling tool wrote them in another layout."""
    found = next((file for pattern in _OTHER_BOXES for file in folder.glob(pattern)), None)
    if found is not None:
        logger.warning(
            "%s: boxes are left out; expected COCO's annotations/instances_<split>.json with <split>/, or "
            "VOC's Annotations/, JPEGImages/ and ImageSets/Main/",
            as_text(str(found)),
        )


def _files(raw: RawDataset) -> list[str]:
    """Paths of the training images."""
    train = raw.splits["train"]
    assert isinstance(train, FileSplit)
    return [part.file for part in train.ranges]


def _are_classes(folder: Path, top: list[str]) -> bool:
    """Folders with only images, and no files next to them, are classes; dates or one folder are not."""
    classes = [name for name in top if name not in UNLABELLED_FOLDERS]
    if all(_DATE.fullmatch(name) for name in classes):
        return False
    return len(classes) >= 2 and all(path.count("/") == 1 for path in walk(folder))


def _coco(folder: Path) -> Description | None:
    """`annotations/instances_<split>.json` and `<split>/`."""
    named = sorted(
        file.stem.removeprefix("instances_") for file in folder.glob("annotations/instances_*.json")
    )
    if not named:
        return None
    splits = [split for split in named if (folder / split).is_dir()]
    if not splits:
        raise DataError(
            f"{folder}: found annotations/instances_{named[0]}.json, but no folder {named[0]} next to "
            f"annotations/; move or link its images to {folder / named[0]}, or give the folder of the "
            "images to leave the boxes out"
        )
    train, test = _train_and_test(folder, splits)
    options = {"path": str(folder / train[0])}
    detection = {"format": "coco", "path": str(folder), "train": train, "test": test}
    return Description("coco", options, _files(_listed(options)), detection=detection)


def _voc(folder: Path) -> Description | None:
    """`Annotations/` and `JPEGImages/`, in the folder itself or one below."""
    homes = _voc_homes(folder)
    if not homes:
        return None
    train: list[str] = []
    test: list[str] = []
    root = Path(os.path.abspath(folder)).parent if homes[0] == folder else folder  # noqa: PTH100 (keeps links)
    if homes[0] == folder and not folder.is_absolute():
        root = Path(os.path.relpath(root))
    name_of = {home: Path(os.path.abspath(home)).name for home in homes}  # noqa: PTH100
    for home in homes:
        names = sorted(file.stem for file in home.glob("ImageSets/Main/*.txt"))
        own_train, own_test = _train_and_test(home, [name for name in names if "_" not in name])
        train += [f"{name_of[home]}/{name}" for name in own_train]
        test += [f"{name_of[home]}/{name}" for name in own_test]
    largest = max(homes, key=lambda home: sum(1 for _ in os.scandir(home / "JPEGImages")))
    lists = [
        f"../ImageSets/Main/{name.rpartition('/')[2]}.txt"
        for name in train
        if name.rpartition("/")[0] == name_of[largest]
    ]
    options: dict[str, Any] = {"path": str(largest / "JPEGImages"), "only_listed": lists}
    detection = {"format": "voc", "path": str(root), "train": train, "test": test}
    return Description("voc", options, _files(_listed(options)), detection=detection)


def _has_boxes(folder: Path) -> bool:
    return bool(_voc_homes(folder)) or any(folder.glob("annotations/instances_*.json"))


def _voc_homes(folder: Path) -> list[Path]:
    """The VOC trees: the folder itself, or folders in it."""
    return [home for home in (folder, *(folder / name for name in subfolders(folder))) if _is_voc(home)]


def _is_voc(home: Path) -> bool:
    return (home / "Annotations").is_dir() and (home / "JPEGImages").is_dir()


def _train_and_test(place: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """The training and test splits: test on `test`, else on `val`. Names may end in a year.

    Raises:
        DataError: there is no such pair.
    """
    known = {**SPLITS, "trainval": "trainval"}
    of_kind: dict[str | None, list[str]] = {}
    for name in names:
        of_kind.setdefault(known.get(name.rstrip("0123456789").lower()), []).append(name)
    both, train, val, test = (of_kind.get(kind, []) for kind in ("trainval", "train", "val", "test"))
    if test and (both or train):
        return (both[:1] or [train[0], *val[:1]]), test[:1]
    if train and val:
        return train[:1], val[:1]
    raise DataError(
        f"{place}: found the splits {', '.join(names) or 'none'}; expected one to train on and one to test "
        "on: for VOC ImageSets/Main/train.txt and val.txt, one image name per line; for COCO "
        "annotations/instances_train.json with train/ and instances_val.json with val/"
    )
