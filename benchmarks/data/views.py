"""Two views of each image, on one thread and without worker processes."""

import io
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.data.pictures import prepared, threads, torchvision_transform
from benchmarks.harness import compare, table
from mochi.config import Augmentation
from mochi.data.photographs import PHOTOGRAPHS, load
from mochi.data.views import augment, crops
from mochi.data.views.loading import Loading, two_views

_BATCH_AT_32_PX, _BATCH_AT_224_PX = 256, 64


def small(rounds: int) -> list[str]:
    """256 images of 32 pixels, version 2 without blur."""
    photos = [load(photograph) for photograph in PHOTOGRAPHS]
    windows = [
        photos[n % len(photos)][7 * n % 200 :, 5 * n % 200 :][:32, :32] for n in range(_BATCH_AT_32_PX)
    ]
    tensor = torch.from_numpy(np.stack(windows))
    rows, side = np.arange(_BATCH_AT_32_PX), np.full(_BATCH_AT_32_PX, 32)
    config = Augmentation(version="v2", image_size=32, min_scale=0.2, blur=False)
    epochs = count()

    def ours() -> None:
        epoch = next(epochs)
        draws = [
            crops.draw(rows, side, side, min_scale=0.2, seed=0, epoch=epoch, view=view) for view in (0, 1)
        ]
        for view, images in enumerate(crops.crop_resize(tensor, draws, 32)):
            parameters = augment.draw(config, rows, seed=0, epoch=epoch, view=view)
            augment.photometric(images, parameters, "v2")

    transform = torchvision_transform(32, blur=False)

    def theirs(images: Any) -> None:
        torch.stack([transform(image) for image in images for _ in (0, 1)])

    alternatives: dict[str, Callable[[], None]] = {
        "ours": ours,
        "torchvision v2, 8-bit tensors": partial(theirs, tensor.permute(0, 3, 1, 2)),
        "torchvision v2, Pillow images": partial(theirs, [Image.fromarray(window) for window in windows]),
    }
    title = "Two views of 32 px, one thread"
    return _table(title, alternatives, rounds, 2 * _BATCH_AT_32_PX)


def large(folder: Path, rounds: int) -> list[str]:
    """64 JPEGs to normalised views of 224 pixels."""
    split = prepared(folder, "photos")
    config = Augmentation(version="v2", image_size=224, min_scale=0.2)
    loading, epochs = Loading(_BATCH_AT_224_PX, torch.device("cpu")), count()
    paths = sorted((folder / "photos").rglob("*.jpg"))[:_BATCH_AT_224_PX]
    encoded = [path.read_bytes() for path in paths]

    def ours() -> None:
        next(two_views(split, config, loading, seed=0, epoch=next(epochs)))

    transform = torchvision_transform(224, blur=True)

    def decode(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def one_decode() -> None:
        images = map(decode, encoded)
        queries, keys = zip(*((transform(image), transform(image)) for image in images), strict=True)
        torch.stack(queries)
        torch.stack(keys)

    def two_decodes() -> None:
        for _ in (0, 1):
            torch.stack([transform(decode(data)) for data in encoded])

    alternatives = {
        "ours": ours,
        "Pillow and torchvision, one decode per image": one_decode,
        "Pillow and torchvision, one decode per view": two_decodes,
    }
    title = "Two views of 224 px from JPEG bytes, one thread"
    return _table(title, alternatives, rounds, 2 * _BATCH_AT_224_PX)


def _table(
    title: str, alternatives: dict[str, Callable[[], None]], rounds: int, num_views: int
) -> list[str]:
    with threads(1):
        return [title, *table(compare(alternatives, rounds=rounds), items=num_views, unit="views")]
