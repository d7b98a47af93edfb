"""The most similar images of a query."""

import torch
from torch import Tensor


def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows most similar to each query by cosine, without the query itself.

    Args:
        features: (M, C) unit vectors.
        queries: (Q,) rows of `features`.
        k: maximum number for each query.

    Returns:
        (Q, min(k, M - 1)) rows, most similar first, and their similarities.
    """
    similarity = features[queries] @ features.T  # (Q, M)
    similarity.scatter_(1, queries[:, None], -torch.inf)
    found = similarity.topk(min(k, len(features) - 1), dim=1)
    return found.indices, found.values


def evenly_spaced(num: int, wanted: int) -> Tensor:
    """At most `wanted` of the rows 0 to num - 1, evenly spread, in order."""
    return torch.linspace(0, max(num - 1, 0), min(num, wanted), dtype=torch.float64).round().long()
