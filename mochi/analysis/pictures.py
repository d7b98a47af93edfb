"""Pictures made of thumbnails, without text: the report shows the names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mochi.storage.atomic import replacing

TILE = 64
"""Side of a thumbnail on a sheet, pixels."""
_GAP, _FRAME, _COLUMN_GAP = 4, 4, 24
_PAPER, _SAME, _OTHER = (255, 255, 255), (0, 114, 178), (213, 94, 0)
_MAP, _DOT = 960, 34
# Okabe and Ito's colours and two greys.
_CLASSES = [
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
    (86, 180, 233), (240, 228, 66), (0, 0, 0), (110, 110, 110), (190, 190, 190),
]  # fmt: skip

Tile = tuple[NDArray[np.uint8], bool | None]
"""A picture (H, W, 3) and whether it is of the query's class; None: unknown."""


def draw_sheet(path: Path, rows: Sequence[tuple[NDArray[np.uint8], Sequence[Sequence[Tile]]]]) -> None:
    """Each query with groups of images in one row.

    Those of the query's class have a full frame; those of other classes a frame of another colour,
    crossed at a corner, so that they can be distinguished in grey.
    """
    step = TILE + 2 * _FRAME + _GAP
    groups = [max((len(row[1][i]) for row in rows), default=0) for i in range(len(rows[0][1]))]
    groups = [group for group in groups if group]
    width = step + sum(_COLUMN_GAP + step * group for group in groups) + _GAP
    sheet = Image.new("RGB", (width, step * len(rows) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (query, groups_of_tiles) in enumerate(rows):
        top = _GAP + index * step
        _paste(sheet, query, (_GAP + _FRAME, top + _FRAME))
        left = _GAP + step
        for tiles in groups_of_tiles:
            left += _COLUMN_GAP if tiles else 0
            for pixels, same in tiles:
                _frame(draw, left, top, same)
                _paste(sheet, pixels, (left + _FRAME, top + _FRAME))
                if same is False:
                    _cross(draw, left, top)
                left += step
    _save(sheet, path)


def draw_map(
    path: Path, points: NDArray[np.float64], pictures: Sequence[NDArray[np.uint8]], classes: Sequence[int]
) -> None:
    """Thumbnails at their positions in the unit square, framed by class; -1 has no frame."""
    sheet = Image.new("RGB", (_MAP, _MAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (x, y), pixels, label in zip(points, pictures, classes, strict=True):
        left, top = (round(float(value) * (_MAP - _DOT - 4)) + 2 for value in (x, 1 - y))
        if label >= 0:
            draw.rectangle((left, top, left + _DOT - 1, top + _DOT - 1), _CLASSES[label % len(_CLASSES)])
        sheet.paste(_resized(pixels, _DOT - 6), (left + 3, top + 3))
    _save(sheet, path)


def _frame(draw: ImageDraw.ImageDraw, left: int, top: int, same: bool | None) -> None:
    if same is not None:
        side = TILE + 2 * _FRAME - 1
        draw.rectangle((left, top, left + side, top + side), _SAME if same else _OTHER)


def _cross(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    x, y = left + TILE - 9, top + 2
    draw.rectangle((x - 2, y - 2, x + 13, y + 13), _OTHER)
    draw.line((x + 1, y + 1, x + 10, y + 10), _PAPER, 3)
    draw.line((x + 1, y + 10, x + 10, y + 1), _PAPER, 3)


def _paste(sheet: Image.Image, pixels: NDArray[np.uint8], corner: tuple[int, int]) -> None:
    sheet.paste(_resized(pixels, TILE), corner)


def _resized(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """Small pictures keep their pixels when they are enlarged."""
    method = Image.Resampling.NEAREST if pixels.shape[0] < side else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), method)


def _save(sheet: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=88)
