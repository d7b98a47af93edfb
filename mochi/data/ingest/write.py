"""Write one split: as pixels, or as shards of encoded images."""

import hashlib
import io
import math
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mochi.data.format import UNLABELLED, StoredSplit, write_encoded, write_index
from mochi.data.ingest import decode
from mochi.data.ingest.raw import ArraySplit, ByteRange, FileSplit, as_text, class_counts, in_batches
from mochi.data.ingest.validate import ValidatedFile, bytes_to_store
from mochi.storage.atomic import replacing

SMALL_SIDE = 128
SMALL_BYTES = 4 << 30
"""Images of one size, no side above SMALL_SIDE and SMALL_BYTES in total, are stored as pixels."""
_INDEX_BYTES = 64
"""Bytes of a row in the index without its path: sha256, label, size and offsets."""


@dataclass
class WrittenSplit:
    """A split on disk, and statistics from writing it."""

    storage: str = "encoded"
    """pixels or encoded."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """name, bytes and sha256 of each file."""
    kept: list[int] = field(default_factory=list)
    """Rows of the source that are stored, in order."""
    hashes: bytearray = field(default_factory=bytearray)
    """sha256, 32 bytes per kept row."""
    sizes: "array[int]" = field(default_factory=lambda: array("i"))
    """Height and width of each kept row, one after the other."""
    reencoded: int = 0
    """Number of re-encoded images."""
    shrunk: int = 0
    """Those of them that were larger than `max_side`."""
    unreadable: list[tuple[str, int, str]] = field(default_factory=list)
    """(path, bytes, reason)."""


def estimated_bytes(split: ArraySplit | FileSplit, max_side: int | None) -> int:
    """Disk space that writing a split takes, from the sizes of its files and of its first image.

    A resized image counts at most one byte for each pixel. Images that will be stored as pixels are on disk
    as files too until the pixels are complete.
    """
    index = sum(len(path) for path in split.paths) + _INDEX_BYTES * len(split.paths)
    if isinstance(split, ArraySplit):
        return math.prod(split.shape) + index
    sizes = [_file_bytes(part) for part in split.ranges]
    if max_side is not None:
        sizes = [min(size, max_side**2) for size in sizes]
    return sum(sizes) + _pixel_bytes(split) + index


def _file_bytes(part: ByteRange) -> int:
    if part.size is not None:
        return part.size
    try:
        return os.stat(part.file).st_size  # noqa: PTH116 - making a Path takes as long
    except OSError:  # will be quarantined
        return 0


def _pixel_bytes(split: FileSplit) -> int:
    """Bytes of the pixels if all images are like the first one; 0 if that is not small."""
    if not split.ranges or split.ranges[0].size is not None:
        return 0
    try:
        width, height = decode.image_size(Path(split.ranges[0].file))
    except decode.UnreadableError:
        return 0
    total = 3 * width * height * len(split.ranges)
    return total if max(width, height) <= SMALL_SIDE and total <= SMALL_BYTES else 0


def write_arrays(out: Path, name: str, split: ArraySplit) -> WrittenSplit:
    """Write images that are pixels already."""
    count, height, width, _ = split.shape
    written = WrittenSplit("pixels", kept=list(range(count)), sizes=array("i", [height, width]) * count)

    def hashed() -> Iterator[NDArray[np.uint8]]:
        for block in split.blocks():
            for image in (whole := np.ascontiguousarray(block)):
                written.hashes += hashlib.sha256(image.data).digest()
            yield whole

    written.files.append(_write_pixels(out / f"{name}-images.npy", hashed(), split.shape))
    return written


def write_files(
    out: Path, name: str, split: FileSplit, files: Iterator[ValidatedFile], shard_bytes: int
) -> WrittenSplit:
    """Write encoded images in shards; or as pixels if all are small and of one size."""
    written = WrittenSplit()
    images = (bytes_to_store(split, file) for file in _readable(split, files, written))
    while True:
        path = out / f"{name}-images-{len(written.files):04d}.arrow"
        with _hashed_file(path) as (shard, description):
            rows = write_encoded(shard, images, shard_bytes)
        if rows == 0:
            path.unlink()
            break
        written.files.append(description)
    if _is_small(written):
        encoded = [out / shard["file"] for shard in written.files]
        entry = {"count": len(written.kept), "storage": "encoded", "shards": written.files}
        reader = StoredSplit(out, name, entry)
        (height, width), count = written.sizes[:2], len(written.kept)
        blocks = (np.stack([reader.image(row) for row in rows]) for rows in in_batches(count, 1024))
        written.storage = "pixels"
        written.files = [_write_pixels(out / f"{name}-images.npy", blocks, (count, height, width, 3))]
        for path in encoded:
            path.unlink()
    return written


def finish(
    out: Path, name: str, split: ArraySplit | FileSplit, written: WrittenSplit, classes: list[str]
) -> dict[str, Any]:
    """Write the index; returns the split's entry of the manifest."""
    labels = split.labels[written.kept]
    paths = [as_text(split.paths[row]) for row in written.kept]
    with _hashed_file(out / f"{name}-index.arrow") as (file, description):
        sizes = np.array(written.sizes, dtype=np.int32).reshape(-1, 2)
        write_index(file, labels, paths, bytes(written.hashes), sizes)
    return {
        "count": len(labels),
        "unlabelled": int((labels == UNLABELLED).sum()),
        "classes": class_counts(labels, classes),
        "storage": written.storage,
        "reencoded": written.reencoded,
        "shrunk": written.shrunk,
        "quarantined": len(written.unreadable),
        "shards": [*written.files, description],
    }


def _readable(
    split: FileSplit, files: Iterator[ValidatedFile], written: WrittenSplit
) -> Iterator[ValidatedFile]:
    """The readable files; `written` records all of them."""
    for file in files:
        result = file.result
        if result.reason:
            written.unreadable.append((split.paths[file.row], file.size, result.reason))
            continue
        written.kept.append(file.row)
        written.hashes += file.sha256
        written.sizes.extend((result.height, result.width))
        written.reencoded += result.reencoded is not None
        written.shrunk += result.shrunk
        yield file


def _is_small(written: WrittenSplit) -> bool:
    sizes = np.unique(np.array(written.sizes).reshape(-1, 2), axis=0)
    if len(sizes) != 1:
        return False
    height, width = sizes[0].tolist()
    total = 3 * height * width * len(written.kept)
    return bool(max(height, width) <= SMALL_SIDE and total <= SMALL_BYTES)


def _write_pixels(
    path: Path, blocks: Iterator[NDArray[np.uint8]], shape: tuple[int, ...]
) -> dict[str, Any]:
    """uint8 (N, H, W, 3), block by block, as one .npy file."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with _hashed_file(path) as (file, description):
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
    return description


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is written, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self.digest = hashlib.sha256()
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.count += size
        self._file.write(data)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _hashed_file(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file to write, and its description, which is complete once the file is."""
    description: dict[str, Any] = {"file": path.name}
    with replacing(path) as temporary:
        file = _Hashing(temporary)
        try:
            yield file, description
        finally:
            file.close()
        description |= {"bytes": file.count, "sha256": file.digest.hexdigest()}
