"""Convert any source to a folder of shards (`mochi.data.format`)."""

import csv
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mochi.config.datasets import Dataset
from mochi.data.format import MANIFEST_VERSION, StoredSplit
from mochi.data.ingest import decode, duplicates, write
from mochi.data.ingest.raw import ArraySplit, Progress, RawDataset, as_text
from mochi.data.ingest.validate import ValidatedFile, Validator
from mochi.errors import DataError
from mochi.storage.atomic import publishing, replacing, require_space, write_json

SHARD_BYTES = 512 << 20
"""Size at which a shard of encoded images is closed."""


def prepare(
    dataset: Dataset,
    out: Path,
    *,
    jobs: int,
    progress: Progress | None = None,
    cache: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Store `dataset` in the folder `out`; returns the manifest.

    The same source, options and program give the same bytes, for any `jobs`. Earlier prepared data in `out`
    are replaced when the new data are complete on disk; until then, and after any error, they are intact.
    `cache` (by default `.cache` in the folder of `out`) keeps downloads; `finish` may add files to the new
    folder that it is given.

    Raises:
        DataError: the source is missing, a different one, empty or inconsistent, or too much of it is
            unreadable.
        StorageError: `out` cannot be written, or has too little space for it.
    """
    raw = collect(dataset, cache or out.parent / ".cache")
    require_space({out: sum(write.estimated_bytes(split, raw.max_side) for split in raw.splits.values())})
    with publishing(out) as new:
        manifest = _write(raw, dataset, new, out, jobs, progress, shard_bytes)
        if finish is not None:
            finish(new)
    listed = {file["file"] for entry in manifest["splits"].values() for file in entry["shards"]}
    for path in (*out.glob("*-images*"), *out.glob("*-index.arrow")):
        if path.name not in listed:  # of an earlier preparation
            path.unlink()
    return manifest


def _write(
    raw: RawDataset,
    dataset: Dataset,
    new: Path,
    out: Path,
    jobs: int,
    progress: Progress | None,
    shard_bytes: int,
) -> dict[str, Any]:
    """Fill the folder `new`, which will become `out`."""
    total = sum(len(split.paths) for split in raw.splits.values())
    entries: dict[str, dict[str, Any]] = {}
    unreadable: list[tuple[str, int, str]] = []
    done = 0
    with Validator(jobs) as validator:
        for name, split in raw.splits.items():
            if isinstance(split, ArraySplit):
                written = write.write_arrays(new, name, split)
            else:
                checked = validator.validate(split, max_side=raw.max_side)
                files = _counted(checked, progress, done, total)
                written = write.write_files(new, name, split, files, shard_bytes)
            unreadable += written.unreadable
            entries[name] = write.finish(new, name, split, written, raw.classes)
            done += len(split.paths)
    _refuse_unreadable(raw, out, total, unreadable)
    _write_quarantine(new, unreadable)
    manifest = {
        "version": MANIFEST_VERSION,
        "name": dataset.name,
        "source": raw.source,
        "licence": raw.licence,
        "classes": raw.classes,
        # Content, not origin: moved or re-downloaded images are the same set.
        "options": dataset.model_dump(
            mode="json", exclude={"path", "archive", "mirrors"}, exclude_defaults=True
        ),
        "listing": raw.listing,
        "rules": decode.RULES,
        "splits": entries,
        "ignored": dict(sorted(raw.ignored.items())),
        "quarantined": len(unreadable),
        "duplicates": _report_duplicates(new, entries, raw.classes),
    }
    write_json(new / "manifest.json", manifest)
    return manifest


def collect(dataset: Dataset, cache: Path) -> RawDataset:
    """List what a source has. The module that reads it is named as the source, with `_` for `-`.

    Raises:
        DataError: the source is missing, a different one or empty.
    """
    module = import_module(f"mochi.data.ingest.sources.{dataset.source.replace('-', '_')}")
    raw: RawDataset = module.collect(dataset, cache)
    return raw


def _counted(
    files: Iterator[ValidatedFile], progress: Progress | None, done: int, total: int
) -> Iterator[ValidatedFile]:
    """The same files; reports the progress over the whole data set."""
    for file in files:
        yield file
        if progress is not None:
            progress(done + file.row + 1, total)


def _report_duplicates(out: Path, entries: dict[str, Any], classes: list[str]) -> dict[str, int]:
    """Write duplicates.csv, one line per row that is not unique; returns the counts."""
    splits = {name: StoredSplit(out, name, entry) for name, entry in entries.items()}
    hashes = {name: split.hashes for name, split in splits.items()}
    labels = {name: split.labels for name, split in splits.items()}
    groups = list(duplicates.groups(hashes, labels))
    rows = (
        (number, row.split, classes[row.label] if row.label >= 0 else "", splits[row.split].path(row.row))
        for number, group in enumerate(groups)
        for row in group
    )
    _write_csv(out / "duplicates.csv", ("group", "split", "class", "path"), rows)
    return duplicates.summary(groups)


def _write_csv(path: Path, header: tuple[str, ...], rows: Any) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([as_text(str(value)) for value in row] for row in rows)


def _write_quarantine(folder: Path, unreadable: list[tuple[str, int, str]]) -> None:
    _write_csv(folder / "quarantine.csv", ("path", "bytes", "reason"), unreadable)


def _refuse_unreadable(
    raw: RawDataset, out: Path, total: int, unreadable: list[tuple[str, int, str]]
) -> None:
    count = len(unreadable)
    if count and (count == total or count > raw.max_unreadable * total):
        _write_quarantine(out, unreadable)
        path, size, reason = unreadable[0]
        raise DataError(
            f"{count} of {total} files are unreadable, more than max_unreadable = "
            f"{raw.max_unreadable} allows; the first: {as_text(path)} ({size} bytes): {reason}; "
            f"all of them: {out / 'quarantine.csv'}; fix or remove them, or raise max_unreadable"
        )
