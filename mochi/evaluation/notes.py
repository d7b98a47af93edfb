"""Warnings about a score: chance level, a single class, classes without images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMED = 5


def notes(
    metrics: Mapping[str, Any],
    train_labels: NDArray[np.int64],
    val_labels: NDArray[np.int64],
    classes: Sequence[str],
) -> list[str]:
    """Warnings about scores that carry little information.

    Args:
        metrics: of the evaluation; `top1` is compared with always predicting the largest class.
        train_labels: of the labelled images of train.
        val_labels: of the labelled images of val.
        classes: names of the classes.
    """
    train, val = (np.bincount(labels, minlength=len(classes)) for labels in (train_labels, val_labels))
    texts = []
    if (train > 0).sum() == 1:
        only = classes[int(train.argmax())]
        texts.append(
            f"train has a single class, {only}: every image is classified as {only}, so the score is "
            "meaningless"
        )
    elif (val > 0).sum() == 1:
        only = classes[int(val.argmax())]
        texts.append(f"val has a single class, {only}: the score is that of {only} alone")
    if len(missing := np.flatnonzero((train == 0) & (val > 0))):
        texts.append(
            f"{_names(missing, classes)} without a labelled image in train: {val[missing].sum()} of "
            f"{val.sum()} images of val cannot be classified correctly"
        )
    if len(missing := np.flatnonzero((val == 0) & (train > 0))):
        texts.append(f"{_names(missing, classes)} without a labelled image in val: not part of the score")
    guess = 100 * val.max() / val.sum()
    top1 = metrics.get("top1")
    if top1 is not None and top1 <= guess < 100 and (train > 0).sum() > 1:
        texts.append(
            f"top-1 of {top1:.1f}% is at or below chance: the largest class has {guess:.1f}% of val. "
            "The encoder may be untrained or collapsed, or the labels wrong"
        )
    return texts


def _names(rows: NDArray[np.int64], classes: Sequence[str]) -> str:
    named = ", ".join(classes[row] for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{len(rows)} of {len(classes)} classes ({named}{more})"
