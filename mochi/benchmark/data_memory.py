"""What loading costs in memory: over many epochs, and for an index of a million rows."""

import multiprocessing
import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

from mochi.benchmark.rows import Row, row
from mochi.config import Augmentation
from mochi.data import format as shards
from mochi.data.format import StoredSplit
from mochi.data.views.loading import two_views


def rows(split: StoredSplit, folder: Path) -> list[Row]:
    """Resident memory over 20 epochs, and private memory of a worker with a million rows.

    Args:
        split: stored encoded, at least 240 images.
        folder: for an index of a million rows.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        return [row("memory", [], [], "MB", note="/proc/self/smaps_rollup is not there to measure with")]
    config = Augmentation(version="v2", image_size=32, min_scale=0.2)
    resident = []
    for epoch in range(20):
        of_workers = _worker_memory(split, config, epoch, 2, "Rss")
        resident.append(_megabytes(os.getpid(), "Rss") + sum(of_workers))
    part = "resident memory of loader and workers, epoch 20 beside epoch 2"
    found = [row(part, [resident[-1]], [resident[1]], "MB")]
    large = repeated(split, 1_000_000 // len(split), folder / "repeated")
    for workers in (1, max(2, os.cpu_count() or 1)):
        sizes = [max(_worker_memory(each, config, 0, workers, "Anonymous")) for each in (large, split)]
        part = f"private memory of a worker, {len(large):,} rows beside {len(split):,}"
        found.append(row(part, [sizes[0]], [sizes[1]], "MB", note=f"the largest of {workers} workers"))
    return found


def repeated(split: StoredSplit, times: int, folder: Path) -> StoredSplit:
    """A split with an index `times` as long, whose rows share the same images."""
    folder.mkdir()
    sizes = np.tile(np.stack([split.heights, split.widths], 1), (times, 1))
    paths = [f"{copy}/{split.path(row)}" for copy in range(times) for row in range(len(split))]
    with (folder / "train-index.arrow").open("wb") as file:
        shards.write_index(file, np.tile(split.labels, times), paths, split.hashes.tobytes() * times, sizes)
    images = [
        {"file": str(split.folder / shard["file"])}
        for shard in split.entry["shards"]
        if "-images-" in shard["file"]
    ]
    entry = split.entry | {"count": len(split) * times, "shards": images * times}
    return StoredSplit(folder, "train", entry)


def _worker_memory(
    split: StoredSplit, config: Augmentation, epoch: int, workers: int, field: str
) -> list[float]:
    """Read 15 batches; returns `field` of each worker, in MB, before they end."""
    batches = two_views(
        split, config, batch_size=16, seed=0, epoch=epoch, device=torch.device("cpu"), workers=workers
    )
    for _ in range(15):
        next(batches)
    processes = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    sizes = [_megabytes(process, field) for process in processes]
    assert isinstance(batches, Generator)
    batches.close()
    return sizes


def _megabytes(process: int, field: str) -> float:
    """`field` of /proc/<pid>/smaps_rollup: Rss is everything resident, Anonymous what no file backs."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(f"smaps_rollup has no {field}")
