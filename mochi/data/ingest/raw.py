"""The content of a source, before any image is stored."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ByteRange(NamedTuple):
    """Location of the bytes of an image: a file, or a part of one (a member of a tar archive)."""

    file: str
    offset: int = 0
    size: int | None = None
    """None: to the end."""


@dataclass(frozen=True)
class ArraySplit:
    """Decoded images of one size, given in blocks (n, H, W, 3) uint8 that make up `shape` (N, H, W, 3)."""

    shape: tuple[int, int, int, int]
    blocks: Callable[[], Iterator[NDArray[np.uint8]]]
    labels: NDArray[np.int64]
    paths: list[str]


@dataclass(frozen=True)
class FileSplit:
    """Encoded images: their bytes, the paths to show, labels (N,) int64, -1 unlabelled."""

    ranges: list[ByteRange]
    paths: list[str]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class RawDataset:
    """One data set as listed by its source; `prepare` converts it to shards."""

    source: str
    """Where it comes from, for the manifest: name, paper or URL."""
    licence: str
    classes: list[str]
    splits: dict[str, ArraySplit | FileSplit]
    ignored: dict[str, int] = field(default_factory=dict)
    """Reason -> number of files skipped on purpose (hidden files, other types)."""
    listing: str = ""
    """Digest of the names of the user's own files, to notice when the folder changes."""
    max_unreadable: float = 0.0
    """Largest share of files that may be quarantined as unreadable."""
    max_side: int | None = None
    """Larger images are resized to this longer side; None: no limit."""

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Split -> class name -> number of images."""
        return {name: class_counts(split.labels, self.classes) for name, split in self.splits.items()}


Progress = Callable[[int, int], None]
"""Called with the number of images done and the total."""


def class_counts(labels: NDArray[np.int64], classes: list[str]) -> dict[str, int]:
    """Class name -> number of rows, empty classes included."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def as_text(path: str) -> str:
    """A path as valid UTF-8, for any bytes in its name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def no_folder(path: Path) -> str:
    """What is at a path that should be a folder, for messages."""
    found = "is a file; expected a folder" if path.exists() else "no such folder"
    return f"{as_text(str(path))}: {found}"


def in_batches(count: int, size: int) -> Iterator[range]:
    """0..count-1 in runs of at most `size`."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
