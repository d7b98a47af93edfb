"""Slow, obvious versions written straight from the equations, in loops and float64. Tests only."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast.negatives import Synthetics


def synthetic_vectors(query: Tensor, queue: Tensor, synthetics: Synthetics) -> Tensor:
    """The vectors that a rule describes: (B, S, C), mixed from their parents' rows by their weights."""
    vectors = torch.einsum("bsp,bspc->bsc", synthetics.weights, queue[synthetics.parents])
    if synthetics.query_weight is not None:
        vectors = vectors + synthetics.query_weight[..., None] * query[:, None]
    return vectors


def mochi_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    synthetics: list[Tensor],
    excluded: Tensor | None = None,
) -> Tensor:
    """MoCHi eq. 1 the usual way: materialised synthetics, one more column of logits for each, autograd."""
    positive = (query * key).sum(-1, keepdim=True)
    negatives = query @ queue.T
    if excluded is not None:
        negatives = negatives.masked_fill(excluded, -torch.inf)
    mixed = [torch.einsum("bc,bsc->bs", query, vectors) for vectors in synthetics]
    logits = torch.cat([positive, negatives, *mixed], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def mixed_pair(first: Tensor, second: Tensor, share: float) -> Tensor:
    """h = (a n_i + (1 - a) n_j) / ||.|| (MoCHi section 3.2)."""
    mixed = share * first + (1 - share) * second
    return mixed / mixed.norm()


def mixed_with_query(query: Tensor, negative: Tensor, share: float) -> Tensor:
    """h' = (b q + (1 - b) n) / ||.|| (MoCHi section 3.3)."""
    mixed = share * query + (1 - share) * negative
    return mixed / mixed.norm()
