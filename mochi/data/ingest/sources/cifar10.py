"""CIFAR-10 in its binary version: rows of label bytes and three 32 x 32 planes. Also reads CIFAR-100."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.config.datasets import Cifar
from mochi.data.ingest.fetch import Archive, fetch, opened
from mochi.data.ingest.raw import ArraySplit, RawDataset
from mochi.errors import DataError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one version of CIFAR."""

    archive: Archive
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    """The class is the last of them."""


# The Python version contains pickles; this one is the same images as plain bytes. Checksum:
# https://www.cs.toronto.edu/~kriz/cifar.html
LAYOUT = Layout(
    archive=Archive(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
        ),
    ),
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    names="batches.meta.txt",
    label_bytes=1,
)


def collect(config: Cifar, cache: Path) -> RawDataset:
    """Read both splits; the test images are `val`. Raises as `read`."""
    return read(LAYOUT, config, cache)


def read(layout: Layout, config: Cifar, cache: Path) -> RawDataset:
    """Read both splits of a version; the test images are `val`.

    Raises:
        DataError: the archive cannot be downloaded, is another file, or lacks a member.
    """
    path = fetch(layout.archive, config, cache)
    with opened(path) as archive:
        classes = _member(archive, layout, layout.names).decode().split()
        train = [_member(archive, layout, file) for file in layout.train]
        test = [_member(archive, layout, layout.test)]
    return RawDataset(
        source=f"{layout.archive.urls[0]} (Krizhevsky 2009, Learning Multiple Layers of Features)",
        licence="none stated; given out for research, cite the report; not redistributed",
        classes=classes,
        splits={
            "train": _split(layout, layout.train, train),
            "val": _split(layout, (layout.test,), test),
        },
    )


def _member(archive: tarfile.TarFile, layout: Layout, file: str) -> bytes:
    try:
        member = archive.extractfile(f"{layout.folder}/{file}")
    except KeyError:
        member = None
    if member is None:
        raise DataError(
            f"{archive.name!s}: found no {layout.folder}/{file} in it; expected {layout.archive.file}; "
            "download it again"
        )
    return member.read()


def _split(layout: Layout, files: tuple[str, ...], contents: list[bytes]) -> ArraySplit:
    row = layout.label_bytes + _PIXELS
    rows = np.concatenate([np.frombuffer(content, np.uint8).reshape(-1, row) for content in contents])
    counts = [len(content) // row for content in contents]
    planes = rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32)

    def blocks() -> Iterator[NDArray[np.uint8]]:
        yield planes.transpose(0, 2, 3, 1)

    return ArraySplit(
        shape=(len(rows), 32, 32, 3),
        blocks=blocks,
        labels=rows[:, layout.label_bytes - 1].astype(np.int64),
        paths=[f"{file}#{n}" for file, count in zip(files, counts, strict=True) for n in range(count)],
    )
