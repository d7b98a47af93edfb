"""Pictures for the benchmarks, made from photographs that need no download."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from mochi.config.datasets import Folder
from mochi.data import format as shards
from mochi.data.format import StoredSplit, open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.photographs import PHOTOGRAPHS, load
from mochi.data.views import augment

WIDTH, HEIGHT = 500, 375  # the most common size in ImageNet


def make_pictures(folder: Path, count: int) -> None:
    """Write distinct JPEGs of 500 x 375 to photos/, and twice as many PNGs of 32 x 32 to small/.

    They are crops of the photographs, resized to these sizes.
    """
    photos = [Image.fromarray(load(photograph)) for photograph in PHOTOGRAPHS]
    for name, number_of, size in (("photos", count, (WIDTH, HEIGHT)), ("small", 2 * count, (32, 32))):
        target = folder / name / "train" / "any"
        target.mkdir(parents=True)
        for number in range(number_of):
            photo = photos[number % len(photos)]
            scale = 0.6 + 0.4 * (number * 0.618 % 1)
            width, height = int(photo.width * scale), int(photo.height * scale)
            left = (photo.width - width) * (number % 7) // 7
            top = (photo.height - height) * (number % 5) // 5
            window = photo.crop((left, top, left + width, top + height))
            window = window.resize(size, Image.Resampling.BICUBIC)
            window.save(target / f"{number}.{'jpg' if name == 'photos' else 'png'}")


def prepared(folder: Path, name: str) -> StoredSplit:
    """The pictures of `folder / name` as a stored split."""
    out = folder / "data" / name
    prepare(Folder(source="folder", name=name, path=str(folder / name)), out, jobs=1)
    return open_dataset(out).split("train")


def repeated(split: StoredSplit, times: int, folder: Path) -> StoredSplit:
    """A split of encoded images with an index `times` as long, whose rows share the same images."""
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


def torchvision_transform(size: int, *, blur: bool) -> Callable[[Any], torch.Tensor]:
    """MoCo v2's transforms of one image (facebookresearch/moco main_moco.py)."""
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
def threads(number: int) -> Iterator[None]:
    """Compute with `number` threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
