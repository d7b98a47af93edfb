"""Preparation of a data set, compared with processes that only decode its files."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.data.bare_decode import decode_files
from benchmarks.data.pictures import HEIGHT, WIDTH
from benchmarks.harness import compare, table
from mochi.config.datasets import Folder
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.raw import in_batches

_COPIES = 8  # of every JPEG, so that the start of the processes matters less


def run(folder: Path, rounds: int, jobs: int) -> list[str]:
    """Prepare `folder / photos` without caches; the start of the processes is included."""
    many = folder / "many" / "train" / "any"
    many.mkdir(parents=True)
    for original in sorted((folder / "photos").rglob("*.jpg")):
        for copy in range(_COPIES):
            (many / f"{copy}-{original.name}").hardlink_to(original)
    paths = [str(path) for path in sorted(many.iterdir())]
    dataset = Folder(source="folder", name="photos", path=str(folder / "many"))

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            prepare(dataset, Path(out) / "data" / "photos", jobs=jobs)

    def bare() -> None:
        tasks = [[paths[row] for row in rows] for rows in in_batches(len(paths), 32)]
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(decode_files, tasks))

    found = compare({"ours": ours, "a bare decode loop": bare}, rounds=rounds)
    return [
        f"Preparation of {len(paths)} JPEGs of {WIDTH} x {HEIGHT}, {jobs} processes",
        *table(found, items=len(paths), unit="images"),
    ]
