"""The data plane beside the usual way: augmentation, loading from JPEG bytes, preparation, memory.

Both sides of a row are timed by turns in one run on the same cores and images, so the ratios hold where
the seconds do not. The usual way is the official code of MoCo: Pillow and torchvision, image by image.
"""

import importlib.util
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torchvision.transforms import v2

from mochi.config import Augmentation, Folder
from mochi.data import augment, crops
from mochi.data.loading import two_views
from mochi.data.origin import in_batches
from mochi.data.photographs import PHOTOGRAPHS, load
from mochi.data.prepare import prepare
from mochi.data.shards import StoredSplit, open_dataset

Row = dict[str, Any]
"""part, ours and beside (medians), unit, ratio (ours / beside), spread of the ratio, runs, note."""

_WIDTH, _HEIGHT = 500, 375  # the usual size of ImageNet's photographs


def run(*, repeats: int = 5, num_images: int = 1024, scratch: Path | None = None) -> list[Row]:
    """All rows, on the photographs that need no download.

    Args:
        repeats: timings of each side, taken by turns.
        num_images: JPEGs of 500 x 375 made for the parts that read files.
        scratch: folder for them; a temporary one when None.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        _make_jpegs(folder / "photos" / "train" / "any", num_images)
        rows = [
            *_small_views(repeats),
            *_large_views(folder, repeats),
            _preparation(folder, repeats),
            *_memory(folder),
        ]
    if importlib.util.find_spec("lightly") is None:
        rows.append(_row("lightly's MoCoV2Transform", [], [], "views/s", note="lightly is not installed"))
    return rows


def _row(part: str, ours: list[float], beside: list[float], unit: str, *, note: str = "") -> Row:
    """Medians, and the median ratio with its range; pairs were timed one after the other."""
    ratios = [mine / other for mine, other in zip(ours, beside, strict=True)]
    return {
        "part": part,
        "ours": statistics.median(ours) if ours else None,
        "beside": statistics.median(beside) if beside else None,
        "unit": unit,
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [min(ratios), max(ratios)] if ratios else None,
        "runs": len(ours),
        "note": note,
    }


def _by_turns(
    repeats: int, ours: Callable[[], float], beside: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Call both `repeats` times, by turns, after one call each to warm up; each returns its rate."""
    ours(), beside()
    pairs = [(ours(), beside()) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _rate(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------- augmentation of small images


def _small_views(repeats: int) -> list[Row]:
    """256 images of 32 pixels, two views each, version 2 without blur, one thread."""
    photos = [load(photograph) for photograph in PHOTOGRAPHS]
    pixels = np.stack([photos[n % 16][7 * n % 200 :, 5 * n % 200 :][:32, :32] for n in range(256)])
    tensor = torch.from_numpy(pixels)
    rows, side = np.arange(256), np.full(256, 32)
    config = Augmentation(version="v2", image_size=32, min_scale=0.2, blur=False)
    epoch = iter(range(10**9))

    def ours() -> None:
        number = next(epoch)
        for view in (0, 1):
            windows, flips = crops.draw(rows, side, side, min_scale=0.2, seed=0, epoch=number, view=view)
            images = crops.crop_resize(tensor, windows, flips, 32)
            parameters = augment.draw(config, rows, seed=0, epoch=number, view=view)
            augment.photometric(images, parameters, "v2")

    planes = tensor.permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in pixels]
    theirs = _torchvision(32, blur=False)

    def per_image(images: Any) -> Callable[[], object]:
        return lambda: torch.stack([theirs(image) for image in images for _ in (0, 1)])

    rows_out = []
    with _one_thread():
        for name, images in (("8-bit tensors", planes), ("Pillow images", pictures)):
            work = per_image(images)
            times = _by_turns(repeats, lambda: _rate(512, ours), lambda work=work: _rate(512, work))  # type: ignore[misc]
            rows_out.append(_row(f"two views of 32 px beside torchvision v2 on {name}", *times, "views/s"))
    return rows_out


def _torchvision(size: int, *, blur: bool) -> Callable[[Any], torch.Tensor]:
    """MoCo v2's transforms, image by image (facebookresearch/moco main_moco.py)."""
    blurring = [v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5)] if blur else []
    transform: Callable[[Any], torch.Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            *blurring,
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
        ]
    )
    return transform


class _one_thread:  # noqa: N801 - reads as a verb where it is used
    """Compute on one thread inside, on as many as before outside."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


# ---------------------------------------------------------------- photographs from their bytes


def _large_views(folder: Path, repeats: int) -> list[Row]:
    """64 JPEGs a batch to two normalised views of 224 pixels, one thread, no workers on either side."""
    split = _prepared(folder, "photos")
    config = Augmentation(version="v2", image_size=224, min_scale=0.2)
    epoch = iter(range(10**9))
    count = 64
    paths = sorted((folder / "photos").rglob("*.jpg"))[:count]
    encoded = [path.read_bytes() for path in paths]

    def ours() -> None:
        batches = two_views(
            split, config, batch_size=count, seed=0, epoch=next(epoch), device=torch.device("cpu")
        )
        next(batches)

    theirs = _torchvision(224, blur=True)

    def decoded_once() -> None:
        images = (Image.open(io.BytesIO(data)).convert("RGB") for data in encoded)
        queries, keys = zip(*((theirs(image), theirs(image)) for image in images), strict=True)
        torch.stack(queries), torch.stack(keys)

    def decoded_for_each() -> None:
        for _ in (0, 1):
            torch.stack([theirs(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])

    rows = []
    with _one_thread():
        for name, work in (("one decode", decoded_once), ("a decode for each view", decoded_for_each)):
            rates = _by_turns(
                repeats,
                lambda: _rate(2 * count, ours),
                lambda work=work: _rate(2 * count, work),  # type: ignore[misc]
            )
            rows.append(
                _row(
                    f"two views of 224 px from JPEG bytes beside Pillow and torchvision, {name}",
                    *rates,
                    "views/s",
                )
            )
    return rows


def _make_jpegs(folder: Path, count: int) -> None:
    """Distinct JPEGs of 500 x 375: windows of the photographs, enlarged where they are smaller."""
    folder.mkdir(parents=True)
    photos = [Image.fromarray(load(photograph)) for photograph in PHOTOGRAPHS]
    for number in range(count):
        photo = photos[number % len(photos)]
        side = 0.6 + 0.4 * (number * 0.618 % 1)
        width, height = int(photo.width * side), int(photo.height * side)
        left, top = (photo.width - width) * number % 7 // 7, (photo.height - height) * number % 5 // 5
        window = photo.crop((left, top, left + width, top + height))
        window.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=90
        )


def _prepared(folder: Path, name: str) -> StoredSplit:
    out = folder / "data" / name
    prepare(Folder(source="folder", name=name, path=str(folder / name)), out, jobs=1)
    return open_dataset(out).split("train")


# ---------------------------------------------------------------- preparation


def _preparation(folder: Path, repeats: int) -> Row:
    """The whole preparation, nothing cached, beside processes that only decode; start-up on both sides."""
    paths = [str(path) for path in sorted((folder / "photos").rglob("*.jpg"))]
    jobs = os.cpu_count() or 1
    dataset = Folder(source="folder", name="photos", path=str(folder / "photos"))

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return _rate(len(paths), lambda: prepare(dataset, Path(out) / "data" / "photos", jobs=jobs))

    def bare() -> float:
        tasks = [[paths[row] for row in rows] for rows in in_batches(len(paths), 32)]

        def work() -> None:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_decode, tasks))

        return _rate(len(paths), work)

    note = f"{len(paths)} JPEGs of {_WIDTH} x {_HEIGHT}, {jobs} processes"
    rates = _by_turns(repeats, ours, bare)
    return _row("preparation beside a bare decode loop", *rates, "images/s", note=note)


def _decode(paths: list[str]) -> None:
    for path in paths:
        Image.open(path).convert("RGB")


# ---------------------------------------------------------------- memory


def _memory(folder: Path) -> list[Row]:
    """Resident memory over 20 epochs, and private memory of a worker with a million rows."""
    if not Path("/proc/self/smaps_rollup").exists():
        return [_row("memory", [], [], "MB", note="/proc/self/smaps_rollup is not there to measure with")]
    split = _prepared(folder, "photos")
    config = Augmentation(version="v2", image_size=32, min_scale=0.2)
    resident = []
    for epoch in range(20):
        of_workers = _epoch(split, config, epoch, workers=2)
        resident.append(_megabytes(os.getpid(), "Rss") + sum(of_workers))
    rows = [
        _row(
            "resident memory of loader and workers, epoch 20 beside epoch 2",
            [resident[-1]],
            [resident[1]],
            "MB",
        )
    ]
    small = _enlarged(split, len(split))
    large = _enlarged(split, 1_000_000)
    for workers in (1, 4):
        sizes = [
            max(_epoch(each, config, 0, workers=workers, field="Anonymous")) for each in (large, small)
        ]
        note = f"{workers} workers; the largest of them"
        rows.append(
            _row(
                "private memory of a worker, 1,000,000 rows beside few",
                [sizes[0]],
                [sizes[1]],
                "MB",
                note=note,
            )
        )
    return rows


class _Enlarged(StoredSplit):
    """A split repeated until it has `count` rows: its index is as long as that of a large set."""

    def __init__(self, split: StoredSplit, count: int) -> None:
        super().__init__(split.folder, split.name, split.entry | {"count": count})
        self._real = int(split.entry["count"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_real": self._real}

    @property
    def labels(self) -> Any:
        """(count,) zeros, one page of memory for all."""
        return np.broadcast_to(np.int64(0), len(self))

    def encoded(self, row: int) -> pa.Buffer:
        """The image whose repetition the row is."""
        return super().encoded(row % self._real)


def _enlarged(split: StoredSplit, count: int) -> StoredSplit:
    return _Enlarged(split, count)


def _epoch(
    split: StoredSplit, config: Augmentation, epoch: int, *, workers: int, field: str = "Rss"
) -> list[float]:
    """Read an epoch (at most 16 batches); returns `field` of each worker, in MB, before the last batch."""
    batches = two_views(
        split, config, batch_size=64, seed=0, epoch=epoch, device=torch.device("cpu"), workers=workers
    )
    sizes: list[float] = []
    for number, _ in enumerate(batches):
        sizes = [
            _megabytes(process.pid, field)
            for process in multiprocessing.active_children()
            if process.pid is not None
        ]
        if number == 14:
            break
    assert isinstance(batches, Generator)
    batches.close()
    return sizes


def _megabytes(process: int, field: str) -> float:
    """`field` of /proc/<pid>/smaps_rollup: Rss is everything resident, Anonymous what no file backs."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(f"smaps_rollup has no {field}")
