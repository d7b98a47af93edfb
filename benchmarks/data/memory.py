"""Memory that loading needs: over many epochs, and with an index of a million rows."""

import multiprocessing
import os
from collections.abc import Generator
from pathlib import Path

import torch

from benchmarks.data.pictures import repeated
from mochi.config import Augmentation
from mochi.data.format import StoredSplit
from mochi.data.views.loading import Loading, two_views


def run(split: StoredSplit, folder: Path, *, num_epochs: int = 20, num_rows: int = 1_000_000) -> list[str]:
    """Resident memory over some epochs, and private memory of a worker with many rows.

    Args:
        split: with encoded images, at least 240.
        folder: for an index of about `num_rows` rows.
        num_epochs: at least 2.
        num_rows: rounded down to a multiple of the length of the split.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        return ["Memory of loading: not measured, as /proc/self/smaps_rollup does not exist"]
    config = Augmentation(version="v2", image_size=32, min_scale=0.2)
    resident = []
    for epoch in range(num_epochs):
        of_workers = _worker_memory(split, config, epoch, 2, "Rss")
        resident.append(_megabytes(os.getpid(), "Rss") + sum(of_workers))
    lines = [
        "Memory of loading",
        _line("loader and 2 workers, resident", f"{num_epochs} epochs", resident[-1], "2", resident[1]),
    ]
    large = repeated(split, num_rows // len(split), folder / "repeated")
    for workers in (1, max(2, os.cpu_count() or 1)):
        part = f"a worker, private, the largest of {workers}"
        many, few = (max(_worker_memory(each, config, 0, workers, "Anonymous")) for each in (large, split))
        lines.append(_line(part, f"{len(large):,} rows", many, f"{len(split):,}", few))
    return lines


def _line(part: str, case: str, size: float, base_case: str, base: float) -> str:
    return f"{part}: {size:.0f} MB with {case}, {base:.0f} MB with {base_case}, ratio {size / base:.2f}"


def _worker_memory(
    split: StoredSplit, config: Augmentation, epoch: int, workers: int, field: str
) -> list[float]:
    """Read 15 batches; returns `field` of each worker, in MB, while they run."""
    loading = Loading(16, torch.device("cpu"), workers)
    batches = two_views(split, config, loading, seed=0, epoch=epoch)
    for _ in range(15):
        next(batches)
    processes = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    sizes = [_megabytes(process, field) for process in processes]
    assert isinstance(batches, Generator)
    batches.close()
    return sizes


def _megabytes(process: int, field: str) -> float:
    """`field` of /proc/<pid>/smaps_rollup: Rss is all resident memory, Anonymous the part not in a file."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(f"smaps_rollup has no {field}")
