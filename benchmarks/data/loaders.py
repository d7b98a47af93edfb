"""An epoch of two views through our loader and through an ordinary DataLoader, on the same cores."""

import importlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.data.pictures import prepared, repeated, threads, torchvision_transform
from benchmarks.harness import compare, table
from mochi.config import Augmentation
from mochi.data.format import StoredSplit
from mochi.data.views.loading import Loading, two_views

_SIZES = {"small": (32, 256), "photos": (224, 64)}  # side of a view in pixels, batch size


def epochs(name: str, folder: Path, rounds: int, cores: int) -> list[str]:
    """Load every picture of `folder / name` four times.

    The ordinary DataLoader decodes with Pillow and makes both views in its workers, one for each core; if
    lightly is installed, its transform runs the same way. The start of the workers is included for all.
    """
    size, batch = _SIZES[name]
    paths = 4 * [str(path) for path in sorted((folder / name).rglob("*.*g"))]
    transform = torchvision_transform(size, blur=size > 32)
    pairs: dict[str, Callable[[Any], Any]] = {
        "torchvision": lambda image: (transform(image), transform(image))
    }
    if importlib.util.find_spec("lightly") is not None:
        pairs["lightly"] = importlib.import_module("lightly.transforms").MoCoV2Transform(input_size=size)
    alternatives = {"ours": _our_epoch(prepared(folder, name), folder / "four-times", size, batch, cores)}
    for library, two in pairs.items():
        loader = DataLoader(_Pictures(paths, two), batch, shuffle=True, num_workers=cores, drop_last=True)
        alternatives[f"a DataLoader with {library}"] = partial(_exhaust, loader)
    # Stored pixels are augmented by threads of one process, encoded images by workers of one thread each.
    with threads(cores if name == "small" else 1):
        found = compare(alternatives, rounds=rounds)
    num_views = 2 * batch * (len(paths) // batch)
    return [
        f"An epoch of two views of {size} px, {cores} cores",
        *table(found, items=num_views, unit="views"),
    ]


def _our_epoch(split: StoredSplit, folder: Path, size: int, batch: int, cores: int) -> Callable[[], None]:
    """Four epochs of stored pixels, or one epoch with every encoded image four times."""
    config = Augmentation(version="v2", image_size=size, min_scale=0.2, blur=size > 32)
    encoded = split.pixels is None
    if encoded:
        split = repeated(split, 4, folder)
    loading = Loading(batch, torch.device("cpu"), workers=cores if encoded else 0)
    numbers = count()

    def work() -> None:
        passes = [
            two_views(split, config, loading, seed=0, epoch=next(numbers))
            for _ in range(1 if encoded else 4)
        ]
        _exhaust(chain(*passes))

    return work


def _exhaust(batches: Iterable[object]) -> None:
    deque(batches, maxlen=0)


class _Pictures(Dataset[Any]):
    """Two views of each file, as in MoCo's TwoCropsTransform."""

    def __init__(self, paths: list[str], two_of: Callable[[Any], Any]) -> None:
        self.paths, self.two_of = paths, two_of

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self.two_of(Image.open(self.paths[row]).convert("RGB"))
        return query, key
