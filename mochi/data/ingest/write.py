"""One split to disk: pixels, shards of encoded images, or a list of images that stay in place."""

import hashlib
import io
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mochi.data import format as shards
from mochi.data.ingest.raw import ArraySplit, FileSplit, as_text, class_counts, in_batches
from mochi.data.ingest.validate import Scanned, stored_bytes
from mochi.storage.atomic import replacing

SMALL_SIDE = 128
SMALL_BYTES = 4 << 30
"""Images of one size, no side above SMALL_SIDE and SMALL_BYTES in all, are stored as pixels."""


@dataclass
class Stored:
    """A split on disk, and what was learnt on the way."""

    storage: str = "encoded"
    """pixels, encoded, or in-place."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """name, bytes and sha256 of each file."""
    kept: list[int] = field(default_factory=list)
    """Rows of the source that are stored, in order."""
    hashes: bytearray = field(default_factory=bytearray)
    """32 bytes a kept row."""
    sizes: "array[int]" = field(default_factory=lambda: array("i"))
    """Height and width of each kept row, one after the other."""
    reencoded: int = 0
    unreadable: list[tuple[str, int, str]] = field(default_factory=list)
    """(path, bytes, reason)."""


def store_arrays(out: Path, name: str, split: ArraySplit) -> Stored:
    """Images that are pixels already."""
    count, height, width, _ = split.shape
    stored = Stored("pixels", kept=list(range(count)), sizes=array("i", [height, width]) * count)

    def hashed() -> Iterator[NDArray[np.uint8]]:
        for block in split.blocks():
            for image in (whole := np.ascontiguousarray(block)):
                stored.hashes += hashlib.sha256(image.data).digest()
            yield whole

    stored.files.append(_write_pixels(out / f"{name}-images.npy", hashed(), split.shape))
    return stored


def store_files(
    out: Path, name: str, split: FileSplit, results: Iterator[Scanned], shard_bytes: int
) -> Stored:
    """Images encoded, in shards; or as pixels when they turn out to be small and of one size."""
    stored = Stored()
    images = (stored_bytes(split, result) for result in _readable(split, results, stored))
    while True:
        path = out / f"{name}-images-{len(stored.files):04d}.arrow"
        with _hashed_file(path) as (file, description):
            rows = shards.write_encoded(file, images, shard_bytes)
        if rows == 0:
            path.unlink()
            break
        stored.files.append(description)
    if _is_small(stored):
        encoded = [out / file["file"] for file in stored.files]
        entry = {"count": len(stored.kept), "storage": "encoded", "shards": stored.files}
        reader = shards.StoredSplit(out, name, entry)
        (height, width), count = stored.sizes[:2], len(stored.kept)
        blocks = (np.stack([reader.image(row) for row in rows]) for rows in in_batches(count, 1024))
        stored.storage = "pixels"
        stored.files = [_write_pixels(out / f"{name}-images.npy", blocks, (count, height, width, 3))]
        for path in encoded:
            path.unlink()
    return stored


def list_in_place(split: FileSplit, results: Iterator[Scanned]) -> Stored:
    """Images that are checked and left where they are."""
    stored = Stored("in-place")
    for _ in _readable(split, results, stored):
        pass
    return stored


def finish(
    out: Path, name: str, split: ArraySplit | FileSplit, stored: Stored, classes: list[str]
) -> dict[str, Any]:
    """Write the index; returns the split's part of the manifest."""
    labels = split.labels[stored.kept]
    paths = [as_text(split.paths[row]) for row in stored.kept]
    with _hashed_file(out / f"{name}-index.arrow") as (file, description):
        sizes = np.array(stored.sizes, dtype=np.int32).reshape(-1, 2)
        shards.write_index(file, labels, paths, bytes(stored.hashes), sizes)
    return {
        "count": len(labels),
        "unlabelled": int((labels == shards.UNLABELLED).sum()),
        "classes": class_counts(labels, classes),
        "storage": stored.storage,
        "reencoded": stored.reencoded,
        "quarantined": len(stored.unreadable),
        "shards": [*stored.files, description],
    }


def _readable(split: FileSplit, results: Iterator[Scanned], stored: Stored) -> Iterator[Scanned]:
    """The readable files; `stored` learns about all of them."""
    for result in results:
        verdict = result.verdict
        if verdict.reason:
            stored.unreadable.append((split.paths[result.row], result.size, verdict.reason))
            continue
        stored.kept.append(result.row)
        stored.hashes += result.sha256
        stored.sizes.extend((verdict.height, verdict.width))
        stored.reencoded += verdict.encoded is not None
        yield result


def _is_small(stored: Stored) -> bool:
    sizes = np.unique(np.array(stored.sizes).reshape(-1, 2), axis=0)
    if len(sizes) != 1:
        return False
    height, width = sizes[0].tolist()
    total = 3 * height * width * len(stored.kept)
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
    """A file to write whole, and its description, filled in once it is written."""
    description: dict[str, Any] = {"file": path.name}
    with replacing(path) as temporary:
        file = _Hashing(temporary)
        try:
            yield file, description
        finally:
            file.close()
        description |= {"bytes": file.count, "sha256": file.digest.hexdigest()}
