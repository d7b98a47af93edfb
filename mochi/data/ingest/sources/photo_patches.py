"""Patches of sixteen photographs that need no download; the label is the photograph.

The task is recognition of texture and colour, and patches of one photograph are false negatives of each
other: good for showing that a pipeline works, not for claims about a method.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.config.datasets import PhotoPatches
from mochi.data.ingest.raw import ArraySplit, RawDataset
from mochi.data.photographs import LICENCE, PHOTOGRAPHS, Cell, cells, load
from mochi.data.views import counter_rng
from mochi.errors import DataError

_FLAT = 2.0
"""Patches whose grey levels have a smaller standard deviation are skipped (night sky, lens mask)."""


def collect(config: PhotoPatches, cache: Path) -> RawDataset:
    """Cut the patches of every photograph at distinct positions, each inside one cell of its split.

    Raises:
        DataError: a photograph is missing or changed, or there are too few distinct patches.
    """
    del cache
    pictures = [load(photograph) for photograph in PHOTOGRAPHS]
    wanted = {"train": config.train_per_photo, "val": config.val_per_photo}
    return RawDataset(
        source="photographs in the packages scikit-image and scikit-learn",
        licence=LICENCE,
        classes=[photograph.name for photograph in PHOTOGRAPHS],
        splits={split: _split(config, split, count, pictures) for split, count in wanted.items()},
    )


def _split(config: PhotoPatches, split: str, count: int, pictures: list[NDArray[np.uint8]]) -> ArraySplit:
    side = config.patch_size
    images, paths = [], []
    for photo, picture in enumerate(pictures):
        for top, left in _positions(config, split, photo, picture, count):
            images.append(picture[top : top + side, left : left + side])
            paths.append(f"{PHOTOGRAPHS[photo].path}#{left},{top}")
    labels = np.repeat(np.arange(len(pictures)), count)
    shape = (len(images), side, side, 3)
    return ArraySplit(shape, lambda: iter([np.stack(images)]), labels, paths)


def _positions(
    config: PhotoPatches, split: str, photo: int, picture: NDArray[np.uint8], count: int
) -> list[tuple[int, int]]:
    """`count` distinct positions (top, left) in a seeded order, without flat patches."""
    side = config.patch_size
    height, width, _ = picture.shape
    own = cells(height, width, seed=config.seed, photo=photo, split=split)
    candidates = np.concatenate([_corners(cell, side) for cell in own])
    order = counter_rng.permutation(len(candidates), f"patches {split}", config.seed, photo)
    chosen: list[tuple[int, int]] = []
    for row in order:
        if len(chosen) == count:
            break
        top, left = candidates[row].tolist()
        if picture[top : top + side, left : left + side].mean(axis=2).std() >= _FLAT:
            chosen.append((top, left))
    if len(chosen) < count:
        raise DataError(
            f"{PHOTOGRAPHS[photo].name}: found {len(chosen)} positions for {split} patches of {side} px; "
            f"expected {count}; lower patch_size or {split}_per_photo"
        )
    return chosen


def _corners(cell: Cell, side: int) -> NDArray[np.int64]:
    """(P, 2) top-left corners of all patches inside the cell."""
    tops = np.arange(cell.top, cell.top + cell.height - side + 1)
    lefts = np.arange(cell.left, cell.left + cell.width - side + 1)
    return np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1).reshape(-1, 2)
