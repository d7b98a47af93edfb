"""STL-10: 5,000 labelled and 100,000 unlabelled training images, 8,000 test images, 96 x 96."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.config.datasets import Stl10
from mochi.data.format import UNLABELLED
from mochi.data.ingest.fetch import Archive, fetch, unpacked
from mochi.data.ingest.raw import ArraySplit, RawDataset, in_batches
from mochi.errors import DataError
from mochi.text import read_lines

# As in torchvision/datasets/stl10.py, whose import alone takes seconds.
ARCHIVE = Archive(
    "stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
    (
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "http://cs.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    ),
)
_SIDE = 96
_BLOCK = 1000


def collect(config: Stl10, cache: Path) -> RawDataset:
    """Map the files: train is the labelled images, then the unlabelled ones with label -1.

    Raises:
        DataError: the archive cannot be downloaded, is another file, or a member is missing or truncated.
    """
    folder = unpacked(fetch(ARCHIVE, config, cache), cache) / "stl10_binary"
    train, unlabelled, test = (_images(folder / f"{name}_X.bin") for name in ("train", "unlabeled", "test"))
    names = read_lines(folder / "class_names.txt", f"the classes in {ARCHIVE.file}")
    labels = np.concatenate([_labels(folder / "train_y.bin"), np.full(len(unlabelled), UNLABELLED)])
    return RawDataset(
        source=f"{ARCHIVE.urls[0]} (Coates, Ng, Lee 2011)",
        licence="images of ImageNet: research use; not redistributed",
        classes=names,
        splits={
            "train": _split({"train": train, "unlabeled": unlabelled}, labels),
            "val": _split({"test": test}, _labels(folder / "test_y.bin")),
        },
    )


def _file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: not in the archive; download {ARCHIVE.file} again")
    return path


def _images(path: Path) -> NDArray[np.uint8]:
    """(N, 3, 96, 96) with width before height, as the files have it; mapped, not read."""
    size = _file(path).stat().st_size
    if size % (3 * _SIDE * _SIDE):
        raise DataError(
            f"{path}: found {size} bytes; expected images of {3 * _SIDE * _SIDE} bytes; "
            f"download {ARCHIVE.file} again"
        )
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, _SIDE, _SIDE)


def _labels(path: Path) -> NDArray[np.int64]:
    """Class numbers from 0; the files count from 1."""
    return np.fromfile(_file(path), np.uint8).astype(np.int64) - 1


def _split(parts: dict[str, NDArray[np.uint8]], labels: NDArray[np.int64]) -> ArraySplit:
    def blocks() -> Iterator[NDArray[np.uint8]]:
        for images in parts.values():
            for rows in in_batches(len(images), _BLOCK):
                yield images[rows.start : rows.stop].transpose(0, 3, 2, 1)

    return ArraySplit(
        shape=(sum(len(images) for images in parts.values()), _SIDE, _SIDE, 3),
        blocks=blocks,
        labels=labels,
        paths=[f"{name}_X.bin#{row}" for name, images in parts.items() for row in range(len(images))],
    )
