"""The data plane beside the usual way: augmentation, loading from JPEG bytes, preparation, memory.

Both sides of a row are timed by turns in one run on the same cores and images, so the ratios hold where
the seconds do not. The usual way is the official code of MoCo: Pillow and torchvision, image by image.
"""

import importlib.util
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mochi.benchmark import data_memory as memory
from mochi.benchmark.bare_decode import decode_files
from mochi.benchmark.rows import Row, row
from mochi.config import Augmentation, Folder
from mochi.data.format import StoredSplit, open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.ingest.raw import in_batches
from mochi.data.photographs import PHOTOGRAPHS, load
from mochi.data.views import augment, crops
from mochi.data.views.loading import two_views

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
        _make_pictures(folder, num_images)
        rows = [
            *_small_views(repeats),
            *_large_views(folder, repeats),
            *_loaders(folder, repeats),
            _preparation(folder, repeats),
            *memory.rows(prepared(folder, "photos"), folder),
        ]
    if importlib.util.find_spec("lightly") is None:
        rows.append(row("a DataLoader with lightly", [], [], "views/s", note="lightly is not installed"))
    return rows


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
    with _threads(1):
        for name, images in (("8-bit tensors", planes), ("Pillow images", pictures)):
            work = per_image(images)
            times = _by_turns(repeats, lambda: _rate(512, ours), lambda work=work: _rate(512, work))  # type: ignore[misc]
            rows_out.append(row(f"two views of 32 px beside torchvision v2 on {name}", *times, "views/s"))
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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute on `number` threads inside, on as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- photographs from their bytes


def _large_views(folder: Path, repeats: int) -> list[Row]:
    """64 JPEGs a batch to two normalised views of 224 pixels, one thread, no workers on either side."""
    split = prepared(folder, "photos")
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
    with _threads(1):
        for name, work in (("one decode", decoded_once), ("a decode for each view", decoded_for_each)):
            rates = _by_turns(
                repeats,
                lambda: _rate(2 * count, ours),
                lambda work=work: _rate(2 * count, work),  # type: ignore[misc]
            )
            rows.append(
                row(
                    f"two views of 224 px from JPEG bytes beside Pillow and torchvision, {name}",
                    *rates,
                    "views/s",
                )
            )
    return rows


def _make_pictures(folder: Path, count: int) -> None:
    """Distinct JPEGs of 500 x 375 in photos/, and twice as many PNGs of 32 x 32 in small/.

    They are windows of the photographs, enlarged where they are smaller.
    """
    photos = [Image.fromarray(load(photograph)) for photograph in PHOTOGRAPHS]
    for name, number_of, size in (("photos", count, (_WIDTH, _HEIGHT)), ("small", 2 * count, (32, 32))):
        target = folder / name / "train" / "any"
        target.mkdir(parents=True)
        for number in range(number_of):
            photo = photos[number % len(photos)]
            share = 0.6 + 0.4 * (number * 0.618 % 1)
            width, height = int(photo.width * share), int(photo.height * share)
            left, top = (
                (photo.width - width) * (number % 7) // 7,
                (photo.height - height) * (number % 5) // 5,
            )
            window = photo.crop((left, top, left + width, top + height))
            window = window.resize(size, Image.Resampling.BICUBIC)
            window.save(target / f"{number}.{'jpg' if name == 'photos' else 'png'}")


def prepared(folder: Path, name: str) -> StoredSplit:
    """The pictures of `folder / name` as a stored split."""
    out = folder / "data" / name
    prepare(Folder(source="folder", name=name, path=str(folder / name)), out, jobs=1)
    return open_dataset(out).split("train")


# ---------------------------------------------------------------- preparation


def _preparation(folder: Path, repeats: int) -> Row:
    """The whole preparation, nothing cached, beside processes that only decode; start-up on both sides.

    Every JPEG stands there eight times, so that the start of the processes weighs less; none is skipped.
    """
    originals = sorted((folder / "photos").rglob("*.jpg"))
    many = folder / "many" / "train" / "any"
    many.mkdir(parents=True)
    for original in originals:
        for copy in range(8):
            (many / f"{copy}-{original.name}").hardlink_to(original)
    paths = [str(path) for path in sorted(many.iterdir())]
    jobs = os.cpu_count() or 1
    dataset = Folder(source="folder", name="photos", path=str(folder / "many"))

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            return _rate(len(paths), lambda: prepare(dataset, Path(out) / "data" / "photos", jobs=jobs))

    def bare() -> float:
        tasks = [[paths[row] for row in rows] for rows in in_batches(len(paths), 32)]

        def work() -> None:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                list(pool.map(decode_files, tasks))

        return _rate(len(paths), work)

    note = f"{len(paths)} JPEGs of {_WIDTH} x {_HEIGHT}, {jobs} processes"
    rates = _by_turns(repeats, ours, bare)
    return row("preparation beside a bare decode loop", *rates, "images/s", note=note)


# ---------------------------------------------------------------- whole loaders, all cores


def _loaders(folder: Path, repeats: int) -> list[Row]:
    """An epoch through ours and through an ordinary DataLoader, on all cores, at 32 and 224 pixels.

    The ordinary one decodes with Pillow and makes both views on its workers, one a core; where lightly is
    installed, its transform is run the same way. Every picture comes four times an epoch, and the start of
    the workers counts on both sides.
    """
    cores = os.cpu_count() or 1
    transforms: dict[str, Callable[[int], Callable[[Any], Any]]] = {
        "torchvision": lambda size: _torchvision(size, blur=size > 32)
    }
    if importlib.util.find_spec("lightly") is not None:
        lightly = importlib.import_module("lightly.transforms")
        transforms["lightly"] = lambda size: lightly.MoCoV2Transform(input_size=size)
    found = []
    # Pixels are worked on by the threads of one process, encoded images by workers of one thread each.
    for size, batch, name, threads in ((32, 256, "small", cores), (224, 64, "photos", 1)):
        with _threads(threads):
            ours = _our_epoch(prepared(folder, name), folder / "four-times", size, batch, cores)
            paths = 4 * [str(path) for path in sorted((folder / name).rglob("*.*g"))]
            for library, make in transforms.items():
                images = _Pictures(paths, make(size), both_at_once=library == "lightly")
                loader = DataLoader(images, batch, shuffle=True, num_workers=cores, drop_last=True)
                rates = _by_turns(repeats, ours, partial(_epoch_rate, loader, batch))
                part = f"an epoch of two views of {size} px beside a DataLoader with {library}"
                found.append(row(part, *rates, "views/s", note=f"{cores} cores"))
    return found


def _our_epoch(split: StoredSplit, folder: Path, size: int, batch: int, cores: int) -> Callable[[], float]:
    """The rate of four epochs of pixels, or of one that has every encoded image four times."""
    config = Augmentation(version="v2", image_size=size, min_scale=0.2, blur=size > 32)
    encoded = split.pixels is None
    if encoded:
        split = memory.repeated(split, 4, folder)
    epoch = count()

    def rate() -> float:
        epochs = [
            two_views(
                split,
                config,
                batch_size=batch,
                seed=0,
                epoch=next(epoch),
                device=torch.device("cpu"),
                workers=cores if encoded else 0,
            )
            for _ in range(1 if encoded else 4)
        ]
        return _epoch_rate(chain(*epochs), batch)

    return rate


def _epoch_rate(batches: Iterable[object], batch: int) -> float:
    """Views a second, from the first ask to the last batch."""
    start = time.perf_counter()
    steps = sum(1 for _ in batches)
    return 2 * batch * steps / (time.perf_counter() - start)


class _Pictures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two views of each file, the usual way."""

    def __init__(self, paths: list[str], transform: Callable[[Any], Any], *, both_at_once: bool) -> None:
        self.paths, self.transform, self.both_at_once = paths, transform, both_at_once

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self.paths[row]).convert("RGB")
        if self.both_at_once:
            query, key = self.transform(image)
            return query, key
        return self.transform(image), self.transform(image)
