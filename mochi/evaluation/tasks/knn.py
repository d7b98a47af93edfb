"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv:1805.01978).

Memory on the device: the features, once, and less than 128 MiB.

Legend: V validation images, M training images, D features.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.config import NearestNeighbours
from mochi.evaluation.confusion import confusion
from mochi.evaluation.features import Frozen, extract_split

logger = logging.getLogger(__name__)

_QUERIES, _BANK = 256, 4096
"""Rows of val and of train that are compared at once."""


def evaluate(frozen: Frozen) -> dict[str, Any]:
    """Classify the validation images by their neighbours in train.

    Returns:
        metrics.json: `top1` in percent, k, temperature and the numbers of images; and `confusion`.

    Raises:
        DataError: a split has no labelled image.
    """
    settings = frozen.run.protocol
    assert isinstance(settings, NearestNeighbours)
    train, train_labels = extract_split(frozen, "train")
    val, val_labels = extract_split(frozen, "val")
    k = min(settings.k, len(train))
    if k < settings.k:
        logger.warning("k = %d is larger than the %d labelled training images; using %d", settings.k, k, k)
    predicted = classify(
        train,
        train_labels,
        val,
        num_classes=len(frozen.dataset.classes),
        k=k,
        temperature=settings.temperature,
    )
    return {
        "top1": round(100 * (predicted == val_labels).double().mean().item(), 4),
        "k": k,
        "temperature": settings.temperature,
        "num_train": len(train),
        "num_val": len(val),
        "confusion": confusion(val_labels, predicted),
    }


def classify(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunks: tuple[int, int] = (_QUERIES, _BANK),
) -> Tensor:
    """Each row's class by a vote of its k most similar training rows, weight exp(cosine / temperature).

    Of equally similar training rows the first ones are neighbours; of classes with equal votes the first
    one wins. So the chunks decide nothing, as far as they do not change the rounding of a cosine.

    Args:
        train: (M, D) float32 features of any length; normalised in place.
        train_labels: (M,) classes.
        val: (V, D) features; normalised in place.
        num_classes: number of classes.
        k: neighbours, at most M.
        temperature: of the weights.
        chunks: rows of val and of train that are compared at once.

    Returns:
        (V,) predicted classes.
    """
    for features in (train, val):
        F.normalize(features, dim=-1, out=features)
    predicted = []
    for queries in val.split(chunks[0]):
        similarity, neighbours = _nearest(queries, train, k, chunks[1])
        # The largest weight is 1, so that a small temperature cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def _nearest(queries: Tensor, bank: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """(Q, k) largest products with rows of the bank, and these rows; of equal ones the first rows."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), chunk):
        keys = _keys(queries @ bank[first : first + chunk].T, first)
        keys = torch.cat([best, keys], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _read(best)


_ROWS = 2**32 - 1


def _keys(similarity: Tensor, first: int) -> Tensor:
    """Whole numbers in the order of (similarity, -row): topk alone leaves open which of equals it takes.

    The upper half is the float's bits, which order like the floats once those below the sign of a
    negative one are flipped; the lower half counts rows downwards.
    """
    bits = similarity.add_(0.0).view(torch.int32)  # -0 becomes 0
    upper = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).long()
    rows = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return upper.mul_(2**32).add_(_ROWS - rows)


def _read(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and rows of keys."""
    upper = (keys >> 32).int()
    return (upper ^ ((upper >> 31) & 0x7FFFFFFF)).view(torch.float32), _ROWS - (keys & _ROWS)
