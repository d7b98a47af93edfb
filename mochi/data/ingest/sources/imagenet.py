"""ImageNet (ILSVRC 2012), whole or the 100 classes of ImageNet-100, from archives or an extracted tree.

The archives are read in place: nothing is unpacked, an image is a byte range of the tar file.
"""

import csv
import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np

from mochi.config.datasets import ImageNet
from mochi.data.ingest.fetch import opened
from mochi.data.ingest.files import walk
from mochi.data.ingest.raw import ByteRange, FileSplit, RawDataset, no_folder
from mochi.errors import DataError
from mochi.text import read_text, shown

_LIST_SHA256 = "79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397"
_TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_KAGGLE = "LOC_val_solution.csv"
_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")

_Image = tuple[str, str, ByteRange]
"""Class (wnid), path to show, bytes."""


def imagenet100() -> list[str]:
    """The wnids of ImageNet-100, sorted: CMC's list (HobbitLong/CMC imagenet100.txt @ 7b227be), pinned."""
    data = files("mochi.data.ingest.sources").joinpath("imagenet100.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == _LIST_SHA256
    return sorted(data.decode().split())


def collect(config: ImageNet, cache: Path) -> RawDataset:
    """List train and val of the requested classes; class numbers follow the sorted wnids.

    Raises:
        DataError: neither archives nor tree, classes missing, or no labels for the validation images.
    """
    del cache
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"{no_folder(root)}; expected {_TRAIN} and {_VAL}, or train/ and val/")
    ignored: Counter[str] = Counter()
    splits = {"train": list(_train(root, ignored)), "val": list(_val(root, ignored))}
    present = {name: {wnid for wnid, _, _ in images} for name, images in splits.items()}
    wanted = imagenet100() if config.subset == "imagenet100" else sorted(present["train"])
    for name in splits:
        missing = sorted(set(wanted) - present[name])
        if missing:
            raise DataError(
                f"{root}: {len(missing)} of the {len(wanted)} classes of {config.subset} have no image "
                f"in {name}: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
                "the extraction is not complete"
            )
    if config.subset == "all" and len(wanted) != _CLASSES:
        raise DataError(
            f"{root}: found {len(wanted)} classes, expected {_CLASSES}; the extraction is not complete "
            "(for a part of ImageNet use subset: imagenet100, or source: folder)"
        )
    return RawDataset(
        source=f"ILSVRC 2012 ({config.subset}; list sha256 {_LIST_SHA256[:12]})"
        if config.subset == "imagenet100"
        else "ILSVRC 2012",
        licence="ImageNet terms of access: research, no redistribution",
        classes=wanted,
        splits={name: _split(images, wanted) for name, images in splits.items()},
        ignored=dict(ignored),
        max_unreadable=config.max_unreadable,
        max_side=config.max_side,
    )


def _split(images: list[_Image], wanted: list[str]) -> FileSplit:
    number = {wnid: label for label, wnid in enumerate(wanted)}
    kept = sorted((path, wnid, part) for wnid, path, part in images if wnid in number)
    return FileSplit(
        [part for _, _, part in kept],
        [path for path, _, _ in kept],
        np.array([number[wnid] for _, wnid, _ in kept], dtype=np.int64),
    )


def _train(root: Path, ignored: Counter[str]) -> Iterator[_Image]:
    """Training images: a tree of class folders, or the archive of one archive per class."""
    if (root / "train").is_dir():
        yield from _by_folder(root, "train", ignored)
    elif (root / _TRAIN).is_file():
        with (root / _TRAIN).open("rb") as file:
            for name, offset, _ in _members(root / _TRAIN):
                file.seek(offset)
                wnid = name.removesuffix(".tar")
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    for member in inner:
                        part = ByteRange(str(root / _TRAIN), member.offset_data, member.size)
                        yield wnid, f"train/{wnid}/{member.name}", part
    else:
        raise DataError(f"{root}: found neither train/ nor {_TRAIN} in it; expected one of them")


def _val(root: Path, ignored: Counter[str]) -> Iterator[_Image]:
    """Validation images: class folders, or a flat folder or archive with the labels in another file."""
    folder = root / "val"
    if folder.is_dir() and any(_WNID.fullmatch(entry.name) for entry in folder.iterdir()):
        yield from _by_folder(root, "val", ignored)
    elif folder.is_dir():
        flat = ((path, ByteRange(str(folder / path))) for path in walk(folder, ignored))
        yield from _labelled(root, flat)
    elif (root / _VAL).is_file():
        members = _members(root / _VAL)
        yield from _labelled(root, ((n, ByteRange(str(root / _VAL), o, s)) for n, o, s in members))
    else:
        raise DataError(f"{root}: found neither val/ nor {_VAL} in it; expected one of them")


def _by_folder(root: Path, split: str, ignored: Counter[str]) -> Iterator[_Image]:
    for path in walk(root / split, ignored):
        if "/" in path:
            yield path.split("/", 1)[0], f"{split}/{path}", ByteRange(str(root / split / path))


def _labelled(root: Path, images: Iterable[tuple[str, ByteRange]]) -> Iterator[_Image]:
    labels = _val_labels(root)
    for path, part in images:
        stem = Path(path).stem
        if stem not in labels:
            raise DataError(f"{root}: {path} is not a validation image of ILSVRC 2012; remove it")
        yield labels[stem], f"val/{path}", part


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in an uncompressed tar archive."""
    with opened(path) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.offset_data, member.size


def _val_labels(root: Path) -> dict[str, str]:
    """ILSVRC2012_val_00000001 -> wnid, from the devkit or from Kaggle's table."""
    if (root / _DEVKIT).is_file():
        with opened(root / _DEVKIT) as devkit:
            contents = {
                Path(member.name).name: content.read()
                for member in devkit
                if member.name.endswith(("/meta.mat", "_validation_ground_truth.txt"))
                and (content := devkit.extractfile(member)) is not None
            }
        return _devkit_labels(root / _DEVKIT, contents)
    if (root / _KAGGLE).is_file():
        return _kaggle_labels(root / _KAGGLE)
    raise DataError(
        f"{root}: the validation images have no class folders and no label file; "
        f"put {_DEVKIT} (or Kaggle's {_KAGGLE}) there"
    )


def _devkit_labels(path: Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Validation image -> wnid, from the class numbers in the devkit."""
    # Imported here: no other file needs scipy, which is optional.
    from scipy.io import loadmat  # noqa: PLC0415

    try:
        synsets = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = contents["ILSVRC2012_validation_ground_truth.txt"].decode().split()
        return {f"ILSVRC2012_val_{n:08d}": wnid[int(number)] for n, number in enumerate(numbers, 1)}
    except Exception as error:  # scipy raises many types on a file that is not MATLAB's
        raise DataError(
            f"{path}: found no matching meta.mat and ground truth ({type(error).__name__}: {error}); "
            "expected the devkit as published; download it again"
        ) from None


def _kaggle_labels(path: Path) -> dict[str, str]:
    """Image -> wnid, the first word of its PredictionString."""
    labels = {}
    table = csv.DictReader(io.StringIO(read_text(path, "Kaggle's table of validation labels"), newline=""))
    try:
        for row in table:
            words = (row.get("PredictionString") or "").split()
            if not row.get("ImageId") or not words or not _WNID.fullmatch(words[0]):
                raise DataError(
                    f"{path}: line {table.line_num}: found {shown(str(list(row.values())))}; expected "
                    "ImageId,PredictionString with a class such as n01440764 first"
                )
            labels[row["ImageId"]] = words[0]
    except csv.Error as error:
        raise DataError(f"{path}: line {table.line_num}: is not CSV: {error}") from None
    return labels
