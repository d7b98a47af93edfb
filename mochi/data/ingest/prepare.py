"""From any source to a folder of shards, as `shards` describes it; the manifest comes last."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mochi.config import Dataset
from mochi.data import format as shards
from mochi.data.format import DataError, StoredSplit
from mochi.data.ingest import decode, duplicates
from mochi.data.ingest import write as store
from mochi.data.ingest.raw import ArraySplit, Origin, Progress, as_text
from mochi.data.ingest.sources import cifar, coco, folder, imagenet, imagenette, photo_patches, stl10, voc
from mochi.data.ingest.validate import Scanned, Scanner, scanning
from mochi.storage.atomic import replacing, write_json

SHARD_BYTES = 512 << 20
"""Size at which a shard of encoded images is closed."""

_COLLECT: dict[str, Callable[[Any, Path], Origin]] = {
    "photo-patches": photo_patches.collect,
    "folder": folder.collect,
    "cifar10": cifar.collect,
    "cifar100": cifar.collect,
    "stl10": stl10.collect,
    "imagenette": imagenette.collect,
    "imagenet": imagenet.collect,
    "voc": voc.collect,
    "coco": coco.collect,
}


def prepare(
    dataset: Dataset,
    out: Path,
    *,
    jobs: int,
    progress: Progress | None = None,
    cache: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Store `dataset` in the folder `out`; returns the manifest, which is written last.

    The same source, options and program give the same bytes, whatever `jobs` is. `cache` (by default
    `.cache` beside `out`) holds downloads and the verdicts on contents, so that a second run decodes
    nothing twice and an interrupted one goes on.

    Raises:
        DataError: the source is missing, foreign, empty, or more of it unreadable than allowed.
    """
    cache = cache or out.parent / ".cache"
    origin = _COLLECT[dataset.source](dataset, cache)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    total = sum(len(split.paths) for split in origin.splits.values())
    entries: dict[str, dict[str, Any]] = {}
    unreadable: list[tuple[str, int, str]] = []
    done = 0
    with scanning(jobs, cache) as scanner:
        for name, split in origin.splits.items():
            stored = _store(scanner, origin, name, out, shard_bytes, _Counter(progress, done, total))
            unreadable += stored.unreadable
            entries[name] = store.finish(out, name, split, stored, origin.classes)
            done += len(split.paths)
    _write_csv(out / "quarantine.csv", ("path", "bytes", "reason"), unreadable)
    _refuse_unreadable(origin, out, total, unreadable)
    manifest = {
        "version": shards.MANIFEST_VERSION,
        "name": dataset.name,
        "source": origin.source,
        "licence": origin.licence,
        "classes": origin.classes,
        "options": dataset.model_dump(mode="json"),
        "listing": origin.listing,
        "rules": decode.RULES,
        "splits": entries,
        "ignored": dict(sorted(origin.ignored.items())),
        "quarantined": len(unreadable),
        "duplicates": _report_duplicates(out, entries, origin.classes),
    }
    write_json(out / "manifest.json", manifest)
    listed = {file["file"] for entry in entries.values() for file in entry["shards"]}
    for path in (*out.glob("*-images*"), *out.glob("*-index.arrow")):
        if path.name not in listed:  # of an earlier preparation
            path.unlink()
    return manifest


class _Counter:
    """Tells `progress` how far the whole data set is."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def over(self, results: Iterator[Scanned]) -> Iterator[Scanned]:
        """The same results, counted."""
        for result in results:
            yield result
            if self._progress is not None:
                self._progress(self._done + result.row + 1, self._total)


def _store(
    scanner: Scanner, origin: Origin, name: str, out: Path, shard_bytes: int, counter: _Counter
) -> store.Stored:
    split = origin.splits[name]
    if isinstance(split, ArraySplit):
        return store.store_arrays(out, name, split)
    if origin.in_place:
        return store.list_in_place(split, counter.over(scanner.scan(split, keep_encoded=False)))
    return store.store_files(out, name, split, counter.over(scanner.scan(split)), shard_bytes)


def _report_duplicates(out: Path, entries: dict[str, Any], classes: list[str]) -> dict[str, int]:
    """Write duplicates.csv, one line a row that is not alone; returns the counts."""
    splits = {name: StoredSplit(out, name, entry) for name, entry in entries.items()}
    hashes = {name: split.hashes for name, split in splits.items()}
    labels = {name: split.labels for name, split in splits.items()}
    found = list(duplicates.groups(hashes, labels))
    rows = (
        (number, row.split, classes[row.label] if row.label >= 0 else "", splits[row.split].path(row.row))
        for number, group in enumerate(found)
        for row in group
    )
    _write_csv(out / "duplicates.csv", ("group", "split", "class", "path"), rows)
    return duplicates.summary(found)


def _write_csv(path: Path, header: tuple[str, ...], rows: Any) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([as_text(str(value)) for value in row] for row in rows)


def _refuse_unreadable(
    origin: Origin, out: Path, total: int, unreadable: list[tuple[str, int, str]]
) -> None:
    count = len(unreadable)
    if count and (count == total or count > origin.max_unreadable * total):
        path, size, reason = unreadable[0]
        raise DataError(
            f"{count} of {total} files are unreadable, more than max_unreadable = "
            f"{origin.max_unreadable} allows; the first: {as_text(path)} ({size} bytes): {reason}; "
            f"all of them: {out / 'quarantine.csv'}; mend or remove them, or raise max_unreadable"
        )
