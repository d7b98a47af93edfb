"""Crops of stored images: from pixels on a device, or from encoded images on a worker."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mochi.data.format import StoredSplit
from mochi.data.ingest.decode import open_image
from mochi.data.views import crops
from mochi.errors import DataError

Rows = NDArray[np.int64]
"""(B,) rows of a split."""


def do_nothing() -> None:
    """Does nothing after an image."""


class RandomCrops:
    """`views` random-resized crops and flips of each image."""

    def __init__(self, size: int, min_scale: float, seed: int, views: int) -> None:
        self.size, self.views = size, views
        self._draw = partial(crops.draw, min_scale=min_scale, seed=seed)

    def of_pixels(self, pixels: Tensor, epoch: int, rows: Rows) -> list[Tensor]:
        """(B, H, W, 3) uint8 -> for each view (B, 3, S, S) float32 in [0, 1]."""
        count, height, width, _ = pixels.shape
        sides = np.full(count, height), np.full(count, width)
        drawn = [self._draw(rows, *sides, epoch=epoch, view=view) for view in range(self.views)]
        return crops.crop_resize(pixels, drawn, self.size)

    def of_split(
        self, split: StoredSplit, epoch: int, rows: Rows, done: Callable[[], None] = do_nothing
    ) -> Tensor:
        """Rows of an encoded split, each decoded once -> (views, B, 3, S, S) uint8.

        `done` is called after each image.
        """
        sides = split.heights[rows].astype(np.int64), split.widths[rows].astype(np.int64)
        drawn = [self._draw(rows, *sides, epoch=epoch, view=view) for view in range(self.views)]
        output = torch.empty(self.views, len(rows), 3, self.size, self.size, dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            image = decode_rgb(split, row)
            for view, (windows, flips) in enumerate(drawn):
                output[view, number] = crops.crop_image(image, windows[number], flips[number], self.size)
            done()
        return output


class CentreCrop:
    """Short side to `resize`, then the central square of `size`, in every epoch."""

    views = 1

    def __init__(self, resize: int, size: int) -> None:
        self.resize, self.size = resize, size

    def of_pixels(self, pixels: Tensor, epoch: int, rows: Rows) -> list[Tensor]:  # noqa: ARG002
        """(B, H, W, 3) uint8 -> one view (B, 3, S, S) float32 in [0, 1]."""
        assert len(rows) == len(pixels)
        return [crops.centre_resize(pixels, self.resize, self.size)]

    def of_split(
        self,
        split: StoredSplit,
        epoch: int,  # noqa: ARG002
        rows: Rows,
        done: Callable[[], None] = do_nothing,
    ) -> Tensor:
        """Rows of an encoded split -> (1, B, 3, S, S) uint8; `done` as above."""
        output = torch.empty(1, len(rows), 3, self.size, self.size, dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            output[0, number] = crops.centre_image(decode_rgb(split, row), self.resize, self.size)
            done()
        return output


Crop = RandomCrops | CentreCrop


def decode_rgb(split: StoredSplit, row: int) -> Tensor:
    """A stored JPEG or PNG as (3, H, W) uint8, by the decoder that checked it.

    Raises:
        DataError: it no longer decodes, so its shard is corrupt.
    """
    try:
        image = open_image(split.encoded(row))
        # `convert` would copy an image that is already RGB.
        upright = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's JPEG and PNG readers raise
        raise DataError(
            f"{split.folder}: {split.path(row)} (row {row} of {split.name}) no longer decodes: {error}; "
            "a shard is corrupt: `mochi check --verify` names it; prepare the data again"
        ) from None
    return torch.from_numpy(upright).permute(2, 0, 1)
