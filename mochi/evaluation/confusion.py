"""Confusion matrix of a classifier."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mochi.storage.atomic import write_rows


def confusion(labels: Tensor, predicted: Tensor) -> list[list[int]]:
    """Rows [class, predicted class, number of images] of all pairs that occur, in the order of the classes.

    Args:
        labels: (V,) true classes.
        predicted: (V,) predicted classes.
    """
    pairs, counts = torch.stack([labels, predicted]).cpu().unique(dim=1, return_counts=True)
    return torch.cat([pairs, counts[None]]).T.tolist()


def write_confusion(path: Path, rows: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Write the rows as CSV with the names of the classes, if the task has predictions."""
    named = [{"class": classes[a], "predicted": classes[b], "images": count} for a, b, count in rows]
    write_rows(path, ["class", "predicted", "images"], named)
