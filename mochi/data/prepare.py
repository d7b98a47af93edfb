"""From any source to shards: the files of `shards`, the manifest last."""

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mochi.config import Dataset
from mochi.data import decode, shards
from mochi.data.origin import ArraySplit, FileSplit, Origin, Progress, class_counts, in_batches
from mochi.data.scan import Scanned, scan
from mochi.data.shards import DataError
from mochi.data.sources import folder, photo_patches
from mochi.running.atomic import replacing, write_json

SHARD_BYTES = 512 << 20
"""Size at which a shard of encoded images is closed."""
SMALL_SIDE = 128
SMALL_BYTES = 4 << 30
"""Images of one size, no side above SMALL_SIDE and SMALL_BYTES in all, are stored as pixels."""

_COLLECT: dict[str, Callable[[Any], Origin]] = {
    "photo-patches": photo_patches.collect,
    "folder": folder.collect,
}


@dataclass
class _Tally:
    """What a pass over the files of a split has learnt."""

    kept: list[int] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    reencoded: int = 0
    unreadable: list[tuple[str, int, str]] = field(default_factory=list)


def prepare(
    dataset: Dataset,
    out: Path,
    *,
    jobs: int,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Store `dataset` in the folder `out`; returns the manifest, which is written last.

    The same source, options and program give the same bytes, whatever `jobs` is.

    Raises:
        DataError: the source is missing, foreign, empty, or more of it unreadable than allowed.
    """
    origin = _COLLECT[dataset.source](dataset)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    total = sum(len(split.paths) for split in origin.splits.values())
    done = 0
    entries: dict[str, dict[str, Any]] = {}
    unreadable: list[tuple[str, int, str]] = []
    for name, split in origin.splits.items():
        if isinstance(split, ArraySplit):
            _store_pixels(out, name, iter([split.images]), split.images.shape)
            tally = _Tally(kept=list(range(len(split.paths))))
            storage, files = "pixels", [f"{name}-images.npy"]
        else:
            results = _counted(scan(split, jobs), done, total, progress)
            tally, storage, files = _store_files(out, name, split, results, shard_bytes)
        unreadable += tally.unreadable
        entries[name] = _finish_split(
            out, name, split, tally=tally, classes=origin.classes, storage=storage, files=files
        )
        done += len(split.paths)
    _write_quarantine(out / "quarantine.csv", unreadable)
    _refuse_unreadable(origin, out, total, unreadable)
    manifest = {
        "version": shards.MANIFEST_VERSION,
        "name": dataset.name,
        "source": origin.source,
        "licence": origin.licence,
        "classes": origin.classes,
        "options": dataset.model_dump(mode="json"),
        "rules": decode.RULES,
        "splits": entries,
        "ignored": dict(sorted(origin.ignored.items())),
        "quarantined": len(unreadable),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _counted(
    results: Iterator[Scanned], done: int, total: int, progress: Progress | None
) -> Iterator[Scanned]:
    for result in results:
        yield result
        if progress is not None:
            progress(done + result.row + 1, total)


def _store_files(
    out: Path, name: str, split: FileSplit, results: Iterator[Scanned], shard_bytes: int
) -> tuple[_Tally, str, list[str]]:
    """Write the images of a split encoded, or as pixels when they turn out small and of one size."""
    tally = _Tally()
    images = _readable(results, split, tally)
    files: list[str] = []
    while True:
        path = out / f"{name}-images-{len(files):04d}.arrow"
        with replacing(path) as temporary:
            rows = shards.write_encoded(temporary, images, shard_bytes)
        if rows == 0:
            path.unlink()
            break
        files.append(path.name)
    for stale in out.glob(f"{name}-images*"):
        if stale.name not in files:
            stale.unlink()
    if not _is_small(tally.sizes, len(tally.kept)):
        return tally, "encoded", files
    (width, height), count = next(iter(tally.sizes)), len(tally.kept)
    entry = {"count": count, "storage": "encoded", "shards": [{"file": file} for file in files]}
    stored = shards.StoredSplit(out, name, entry)
    blocks = (
        np.stack([np.asarray(stored.decode(row)) for row in rows]) for rows in in_batches(count, 1024)
    )
    _store_pixels(out, name, blocks, (count, height, width, 3))
    for file in files:
        (out / file).unlink()
    return tally, "pixels", [f"{name}-images.npy"]


def _readable(results: Iterator[Scanned], split: FileSplit, tally: _Tally) -> Iterator[bytes]:
    """The bytes to store of every readable file; the tally learns the rest."""
    for result in results:
        verdict = result.verdict
        if verdict.reason:
            tally.unreadable.append((split.paths[result.row], result.size, verdict.reason))
            continue
        tally.kept.append(result.row)
        tally.sizes.add((verdict.width, verdict.height))
        tally.reencoded += verdict.encoded is not None
        yield result.stored


def _is_small(sizes: set[tuple[int, int]], count: int) -> bool:
    if len(sizes) != 1:
        return False
    width, height = next(iter(sizes))
    return max(width, height) <= SMALL_SIDE and 3 * width * height * count <= SMALL_BYTES


def _store_pixels(
    out: Path, name: str, blocks: Iterator[NDArray[np.uint8]], shape: tuple[int, ...]
) -> None:
    """Write uint8 (N, H, W, 3) block by block, as one .npy file."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(out / f"{name}-images.npy") as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def _finish_split(
    out: Path,
    name: str,
    split: ArraySplit | FileSplit,
    *,
    tally: _Tally,
    classes: list[str],
    storage: str,
    files: list[str],
) -> dict[str, Any]:
    """Write the index of a split; returns its part of the manifest."""
    labels = split.labels[tally.kept]
    index = out / f"{name}-index.arrow"
    with replacing(index) as temporary:
        shards.write_index(temporary, labels, (_as_text(split.paths[row]) for row in tally.kept))
    return {
        "count": len(labels),
        "unlabelled": int((labels == shards.UNLABELLED).sum()),
        "classes": class_counts(labels, classes),
        "storage": storage,
        "reencoded": tally.reencoded,
        "quarantined": len(tally.unreadable),
        "shards": [_describe(out / file) for file in [*files, index.name]],
    }


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def _as_text(path: str) -> str:
    """A path as valid UTF-8, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _write_quarantine(path: Path, rows: list[tuple[str, int, str]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "bytes", "reason"])
        writer.writerows((_as_text(name), size, reason) for name, size, reason in rows)


def _refuse_unreadable(
    origin: Origin, out: Path, total: int, unreadable: list[tuple[str, int, str]]
) -> None:
    count = len(unreadable)
    if count and (count == total or count > origin.max_unreadable * total):
        path, size, reason = unreadable[0]
        raise DataError(
            f"{count} of {total} files are unreadable, more than max_unreadable = "
            f"{origin.max_unreadable} allows; the first: {_as_text(path)} ({size} bytes): {reason}; "
            f"all of them: {out / 'quarantine.csv'}; mend or remove them, or raise max_unreadable"
        )
