"""Alignment and uniformity of features on the unit sphere (Wang & Isola 2020, arXiv:2005.10242)."""

import math

import torch
from torch import Tensor

_CHUNK = 1024
"""Rows compared with all others at once."""


def alignment(features: Tensor, labels: Tensor) -> float | None:
    """Mean squared distance between two images of a class, over all such pairs (MoCHi section 5.2).

    Source: SsnL/align_uniform, `align_loss` with alpha = 2; positives are images of one class.
    In a class of n unit vectors that add up to S, the pairs' squared distances add up to n^2 - |S|^2.

    Args:
        features: (M, C) unit vectors.
        labels: (M,) classes; -1: ignored.

    Returns:
        0 if all images of a class coincide, about 2 for uniform features; None without a pair.
    """
    known = labels >= 0
    _, classes, counts = labels[known].unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    pairs = (counts * (counts - 1) / 2).sum().item()
    if not pairs:
        return None
    sums = features.new_zeros(len(counts), features.shape[1], dtype=torch.float64)
    sums.index_add_(0, classes, features[known].double())
    return float((counts.square() - sums.square().sum(1)).sum().item() / pairs)


def uniformity(features: Tensor) -> float | None:
    """Logarithm of the mean of exp(-2 |x - y|^2) over all pairs of different images.

    Source: SsnL/align_uniform, `uniform_loss` with t = 2. Memory: 1024 rows of similarities.

    Args:
        features: (M, C) unit vectors.

    Returns:
        0 if all images coincide, lower the more evenly they cover the sphere; None for fewer than two.
    """
    num = len(features)
    if num < 2:
        return None
    total = 0.0
    for rows in features.split(_CHUNK):
        total += (4 * (rows @ features.T) - 4).double().exp().sum().item()
    itself = (4 * features.square().sum(1) - 4).double().exp().sum().item()
    return math.log((total - itself) / (num * (num - 1)))
