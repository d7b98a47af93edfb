"""Patches of sixteen photographs that need no download; the label is the photograph.

It is recognition of texture and colour, and patches of one photograph are false negatives of one
another: good for showing that a pipeline works, not for claims about a method.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mochi.config import PhotoPatches
from mochi.data.format import DataError
from mochi.data.ingest.raw import ArraySplit, Origin
from mochi.data.photographs import LICENCE, PHOTOGRAPHS, Cell, cells, load
from mochi.data.views import counter_rng as draws

_FLAT = 2.0
"""A patch whose grey levels deviate less than this shows nothing (night sky, the mask of a lens)."""


def collect(config: PhotoPatches, cache: Path) -> Origin:
    """Cut the patches of every photograph, distinct places, each inside one cell of its split.

    Raises:
        DataError: a photograph is missing or another, or a split asks for more patches than there are.
    """
    del cache
    pictures = [load(photograph) for photograph in PHOTOGRAPHS]
    wanted = {"train": config.train_per_photo, "val": config.val_per_photo}
    return Origin(
        source="photographs in the packages scikit-image and scikit-learn",
        licence=LICENCE,
        classes=[photograph.name for photograph in PHOTOGRAPHS],
        splits={split: _split(config, split, count, pictures) for split, count in wanted.items()},
    )


def _split(config: PhotoPatches, split: str, count: int, pictures: list[NDArray[np.uint8]]) -> ArraySplit:
    side = config.patch_size
    images, paths = [], []
    for photo, picture in enumerate(pictures):
        for top, left in _places(config, split, photo, picture, count):
            images.append(picture[top : top + side, left : left + side])
            paths.append(f"{PHOTOGRAPHS[photo].path}#{left},{top}")
    labels = np.repeat(np.arange(len(pictures)), count)
    shape = (len(images), side, side, 3)
    return ArraySplit(shape, lambda: iter([np.stack(images)]), labels, paths)


def _places(
    config: PhotoPatches, split: str, photo: int, picture: NDArray[np.uint8], count: int
) -> list[tuple[int, int]]:
    """`count` distinct places (top, left) in a seeded order, flat ones passed over."""
    side = config.patch_size
    height, width, _ = picture.shape
    own = cells(height, width, seed=config.seed, photo=photo, split=split)
    candidates = np.concatenate([_corners(cell, side) for cell in own])
    order = draws.permutation(len(candidates), f"patches {split}", config.seed, photo)
    chosen: list[tuple[int, int]] = []
    for row in order:
        if len(chosen) == count:
            break
        top, left = candidates[row].tolist()
        if picture[top : top + side, left : left + side].mean(axis=2).std() >= _FLAT:
            chosen.append((top, left))
    if len(chosen) < count:
        raise DataError(
            f"{PHOTOGRAPHS[photo].name}: found {len(chosen)} places for {split} patches of {side} pixels; "
            f"{count} were asked; lower patch_size or {split}_per_photo"
        )
    return chosen


def _corners(cell: Cell, side: int) -> NDArray[np.int64]:
    """(P, 2) top-left corners of all patches inside the cell."""
    tops = np.arange(cell.top, cell.top + cell.height - side + 1)
    lefts = np.arange(cell.left, cell.left + cell.width - side + 1)
    return np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1).reshape(-1, 2)
