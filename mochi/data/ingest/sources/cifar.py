"""CIFAR-10 and CIFAR-100 in their binary version: rows of label bytes and three 32 x 32 planes."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.config import Cifar
from mochi.data.format import DataError
from mochi.data.ingest.fetch import Archive, fetch, opened
from mochi.data.ingest.raw import ArraySplit, Origin

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    archive: Archive
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    """CIFAR-100 has a coarse label before the fine one."""


# The python version holds pickles; this one is the same images as plain bytes. Checksums:
# https://www.cs.toronto.edu/~kriz/cifar.html
LAYOUTS = {
    "cifar10": _Layout(
        Archive(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            (
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
            ),
        ),
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": _Layout(
        Archive(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        ),
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
    ),
}


def collect(config: Cifar, cache: Path) -> Origin:
    """Read both splits; the test images are `val`.

    Raises:
        DataError: the archive cannot be had, is another, or lacks a file.
    """
    layout = LAYOUTS[config.source]
    path = fetch(layout.archive, config, cache)
    with opened(path) as archive:
        classes = _read(archive, layout, layout.names).decode().split()
        train = [_read(archive, layout, file) for file in layout.train]
        test = [_read(archive, layout, layout.test)]
    return Origin(
        source=f"{layout.archive.urls[0]} (Krizhevsky 2009, Learning Multiple Layers of Features)",
        licence="none stated; given out for research, cite the report; not redistributed",
        classes=classes,
        splits={
            "train": _split(layout, layout.train, train),
            "val": _split(layout, (layout.test,), test),
        },
    )


def _read(archive: tarfile.TarFile, layout: _Layout, file: str) -> bytes:
    try:
        member = archive.extractfile(f"{layout.folder}/{file}")
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{archive.name!s}: no {layout.folder}/{file} in it; bring {layout.archive.file}")
    return member.read()


def _split(layout: _Layout, files: tuple[str, ...], contents: list[bytes]) -> ArraySplit:
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
