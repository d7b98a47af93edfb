"""On-disk format: a folder with manifest.json, arrays and memory-mapped shards.

    manifest.json            what it is, where from, counts, classes, sha256 of every file
    <split>-index.arrow      a row per image: label (-1 unlabelled), path in the source, sha256, size
    <split>-images.npy       uint8 (N, H, W, 3), when all images are small and of one size; else
    <split>-images-0000.arrow ...  the encoded bytes (JPEG or PNG) of upright RGB images

Everything is memory-mapped, so rows need no memory in each process.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mochi.data.ingest.decode import open_image
from mochi.errors import DataError
from mochi.text import Fields, read_json

MANIFEST_VERSION = 2
UNLABELLED = -1

_LARGE_SIDE = 2048
"""Pixels; nine times the side of the usual view."""


class StoredSplit:
    """The images of one split. Cheap to send to a worker: each process opens the files itself."""

    def __init__(self, folder: Path, name: str, entry: dict[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.entry = entry

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "name": self.name, "entry": self.entry}

    def __len__(self) -> int:
        return int(self.entry["count"])

    @cached_property
    def _index(self) -> pa.Table:
        index = read_arrow(self.folder / f"{self.name}-index.arrow", INDEX_SCHEMA)
        self._expect(len(index), "the index")
        return index

    def _column(self, name: str, dtype: type[np.generic], width: int = 1) -> NDArray[Any]:
        """A column of numbers as a view of the file. (Arrow's own to_numpy imports pandas.)"""
        if len(self) == 0:
            return np.empty(0, dtype)
        buffer = self._index[name].chunk(0).buffers()[1]
        return np.frombuffer(buffer, dtype, count=width * len(self))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class numbers, -1 for no label; a view of the file."""
        return self._column("label", np.int64)

    @cached_property
    def hashes(self) -> NDArray[np.uint8]:
        """(N, 32) sha256 of each image's content; a view of the file."""
        return self._column("sha256", np.uint8, width=32).reshape(-1, 32)

    @cached_property
    def heights(self) -> NDArray[np.int32]:
        """(N,) pixels; a view of the file."""
        return self._column("height", np.int32)

    @cached_property
    def widths(self) -> NDArray[np.int32]:
        """(N,) pixels; a view of the file."""
        return self._column("width", np.int32)

    @cached_property
    def labelled(self) -> NDArray[np.int64]:
        """Rows with a label."""
        return np.flatnonzero(self.labels != UNLABELLED)

    def oversized(self) -> str:
        """The message of the function `oversized` about these images."""
        return oversized(self.name, self.heights, self.widths, self.path)

    def path(self, row: int) -> str:
        """Path of the image in its source."""
        return str(self._index["path"][row].as_py())

    @cached_property
    def pixels(self) -> NDArray[np.uint8] | None:
        """uint8 (N, H, W, 3), a view of the file, or None when images are stored encoded."""
        if self.entry["storage"] != "pixels":
            return None
        path = self.folder / f"{self.name}-images.npy"
        try:
            array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: is corrupt ({error}); prepare the data again") from None
        self._expect(len(array), "images")
        return array

    @cached_property
    def _encoded(self) -> pa.ChunkedArray:
        files = [shard["file"] for shard in self.entry["shards"]]
        shards = [read_arrow(self.folder / file, IMAGE_SCHEMA) for file in files if "-images-" in file]
        images = pa.chunked_array(
            [chunk for shard in shards for chunk in shard["image"].chunks], pa.binary()
        )
        self._expect(len(images), "images")
        return images

    def _expect(self, rows: int, what: str) -> None:
        """Refuse files that do not fit the manifest."""
        if rows != self.entry["count"]:
            raise DataError(
                f"{self.folder}: found {rows} rows of {what} in {self.name}; expected "
                f"{self.entry['count']} as in manifest.json; prepare the data again: {_how(self.folder)}"
            )

    def image(self, row: int) -> NDArray[np.uint8]:
        """(H, W, 3), upright RGB."""
        if self.pixels is not None:
            picture: NDArray[np.uint8] = self.pixels[row]
            return picture
        return np.asarray(open_image(self.encoded(row)).convert("RGB"))

    def encoded(self, row: int) -> pa.Buffer:
        """The bytes of a JPEG or PNG, a view of the file, for splits stored encoded."""
        return self._encoded[row].as_buffer()


def oversized(
    split: str, heights: NDArray[np.int32], widths: NDArray[np.int32], path: Callable[[int], str]
) -> str:
    """A message about images (N,) far larger than any view; empty if there are none."""
    longest = np.maximum(heights, widths)
    count = int((longest > _LARGE_SIDE).sum())
    if not count:
        return ""
    row = int(longest.argmax())
    return (
        f"{count} images of {split} have a side of more than {_LARGE_SIDE} px, such as {path(row)} "
        f"({widths[row]} x {heights[row]}), and are fully decoded each time they are read; "
        f"dataset.max_side: {_LARGE_SIDE // 2} stores them smaller"
    )


class StoredDataset:
    """A prepared data set: its manifest and its splits."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.classes: list[str] = manifest["classes"]
        self._opened: dict[str, StoredSplit] = {}

    def split(self, name: str) -> StoredSplit:
        """One split; the same object each time, so that its pixels are copied to a device only once.

        Raises:
            DataError: the data set has no such split, or one of its files is missing or truncated.
        """
        if name in self._opened:
            return self._opened[name]
        splits = self.manifest["splits"]
        if name not in splits:
            known = ", ".join(sorted(splits)) or "none"
            raise DataError(f"{self.folder}: found no split {name!r}; expected one of: {known}")
        for shard in splits[name]["shards"]:
            path = self.folder / shard["file"]
            found = path.stat().st_size if path.exists() else None
            if found != shard["bytes"]:
                raise DataError(
                    f"{path}: found {'no file' if found is None else f'{found} bytes'}; expected "
                    f"{shard['bytes']} bytes; prepare the data again: {_how(self.folder)}"
                )
        split = StoredSplit(self.folder, name, splits[name])
        if splits[name]["count"]:
            _ = split.labels  # check the index
        return self._opened.setdefault(name, split)

    def damaged(self) -> list[Path]:
        """Files that are missing or whose sha256 is not the manifest's; reads all of them."""
        files = [file for entry in self.manifest["splits"].values() for file in entry["shards"]]
        return [self.folder / file["file"] for file in files if not self._is_whole(file)]

    def _is_whole(self, file: dict[str, Any]) -> bool:
        path = self.folder / file["file"]
        if not path.is_file():
            return False
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == str(file["sha256"])


def open_dataset(folder: Path) -> StoredDataset:
    """Open what `prepare` wrote.

    Raises:
        DataError: it does not exist, is unreadable, or was written by another version.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise DataError(f"{path}: not found; prepare the data first: {_how(folder)}")
    try:
        manifest = read_json(path, "what `mochi prepare` wrote")
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version != MANIFEST_VERSION:
            raise DataError(f"{path}: found version {version!r:.60}; expected {MANIFEST_VERSION}")
        _check_manifest(Fields.of(manifest, str(path)))
    except DataError as error:
        raise DataError(f"{error}; prepare the data again: {_how(folder)}") from None
    return StoredDataset(folder, manifest)


def _check_manifest(manifest: Fields) -> None:
    """Refuse an edited or truncated manifest: every field that is read must exist."""
    if not all(isinstance(name, str) for name in manifest.items("classes")):
        raise manifest.error("classes", "a list of names")
    splits = Fields.of(manifest.values.get("splits"), f"{manifest.where}: splits")
    for name, value in splits.values.items():
        entry = Fields.of(value, f"{splits.where}.{name}")
        count, unlabelled = (entry.integer(key, at_least=0) for key in ("count", "unlabelled"))
        if unlabelled > count:
            raise entry.error("unlabelled", f"at most count = {count}")
        if entry.text("storage") not in {"pixels", "encoded"}:
            raise entry.error("storage", "pixels or encoded")
        counts = Fields.of(entry.values.get("classes"), f"{entry.where}.classes")
        if list(counts.values) != manifest.values["classes"]:
            raise entry.error("classes", "a count of each class")
        for label in counts.values:
            counts.integer(label, at_least=0)
        for shard in entry.objects("shards"):
            shard.text("sha256")
            shard.integer("bytes", at_least=0)
            if Path(shard.text("file")).name != shard.values["file"]:
                raise shard.error("file", "a name in the folder")


def _how(folder: Path) -> str:
    return f"by Snakemake, or `mochi prepare --config FILE --out {folder}`"


def read_arrow(path: Path, schema: pa.Schema) -> pa.Table:
    """A memory-mapped Arrow file as a table; nothing is copied.

    Raises:
        DataError: not an Arrow file, a corrupt one, or one with other columns.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is corrupt ({type(error).__name__}); prepare the data again") from None
    if table.schema != schema:
        raise DataError(f"{path}: found columns {table.schema.names}; prepare the data again")
    return table


INDEX_SCHEMA = pa.schema(
    [
        ("label", pa.int64()),
        ("path", pa.string()),
        ("sha256", pa.binary(32)),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
IMAGE_SCHEMA = pa.schema([("image", pa.binary())])
_BATCH_BYTES = 16 << 20
"""A record batch is kept in memory while it is written; binary offsets allow at most 2 GiB."""


def write_index(
    file: BinaryIO, labels: NDArray[np.int64], paths: list[str], hashes: bytes, sizes: NDArray[np.int32]
) -> None:
    """The index of a split, as one record batch, so that a column is one view of the file.

    `hashes` has 32 bytes per row; `sizes` (N, 2) is height and width.
    """
    sha256 = pa.Array.from_buffers(pa.binary(32), len(paths), [None, pa.py_buffer(hashes)])
    height, width = (pa.array(np.ascontiguousarray(side)) for side in sizes.T)
    columns = [pa.array(labels), pa.array(paths, pa.string()), sha256, height, width]
    with pa.ipc.new_file(file, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=INDEX_SCHEMA))


def write_encoded(file: BinaryIO, images: Iterator[bytes], shard_bytes: int) -> int:
    """Take images until the shard has `shard_bytes`; returns how many (0: the iterator is empty)."""
    rows, written, pending, pending_bytes = 0, 0, [], 0
    with pa.ipc.new_file(file, IMAGE_SCHEMA) as writer:
        while written < shard_bytes and (image := next(images, None)) is not None:
            pending.append(image)
            pending_bytes += len(image)
            written += len(image)
            rows += 1
            if pending_bytes >= _BATCH_BYTES:
                writer.write_batch(_binary_batch(pending))
                pending, pending_bytes = [], 0
        if pending:
            writer.write_batch(_binary_batch(pending))
    return rows


def _binary_batch(values: list[bytes]) -> pa.RecordBatch:
    """One column of bytes, joined once, because Arrow's builder would copy them repeatedly."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    column = pa.Array.from_buffers(pa.binary(), len(values), buffers)
    return pa.record_batch([column], schema=IMAGE_SCHEMA)
