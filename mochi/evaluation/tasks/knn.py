"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv:1805.01978)."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.config import NearestNeighbours
from mochi.evaluation.features import Frozen, extract_splits

logger = logging.getLogger(__name__)


def evaluate(frozen: Frozen) -> dict[str, Any]:
    """Classify the validation images by their neighbours in train.

    Returns:
        metrics.json: `top1` in percent, k, temperature and the numbers of images.

    Raises:
        DataError: a split has no labelled image.
    """
    settings = frozen.run.protocol
    assert isinstance(settings, NearestNeighbours)
    train, train_labels, val, val_labels = extract_splits(frozen)
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
    }


def classify(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 256,
) -> Tensor:
    """Each row's class by a vote of its k most similar training rows, weight exp(cosine / temperature).

    Args:
        train: (M, D) features, any length; compared by cosine.
        train_labels: (M,) classes.
        val: (V, D) features.
        num_classes: number of classes.
        k: neighbours, at most M.
        temperature: of the weights.
        chunk: rows of `val` compared at once, so that memory stays (chunk, M).

    Returns:
        (V,) predicted classes.
    """
    train = F.normalize(train, dim=-1)
    predicted = []
    for rows in F.normalize(val, dim=-1).split(chunk):
        similarity, neighbours = (rows @ train.T).topk(k, dim=1)  # (chunk, k)
        # The largest weight is 1, so that a small temperature cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), num_classes, device=rows.device, dtype=rows.dtype)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
