"""Slow, obvious versions written from the equations, in loops and float64, for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast.negatives import Synthetics, VectorSynthetics
from mochi.contrast.rules import Candidates, Rule
from mochi.contrast.rules.moco import MoCo


@dataclass(frozen=True, kw_only=True)
class Given(MoCo):
    """MoCo with synthetics that a test gives for some similarities."""

    make: Callable[[Tensor], list[Synthetics]]

    def synthetics(self, candidates: Candidates) -> list[Synthetics]:
        return self.make(candidates.similarity)


def simple_form(rule: Rule) -> Rule:
    """The rule without its fused form: autograd differentiates its loss."""
    kind = type(rule)

    def loss(self: Rule, *arguments: Any) -> Tensor:
        return kind.loss(self, *arguments)

    simple = type(f"Simple{kind.__name__}", (kind,), {"loss": loss})(**vars(rule))
    assert isinstance(simple, Rule)
    assert not simple.is_fused
    return simple


def synthetic_vectors(query: Tensor, queue: Tensor, synthetics: Synthetics) -> Tensor:
    """The vectors that a rule describes: (B, S, C), mixed from the rows of their parents by their
    weights.
    """
    if isinstance(synthetics, VectorSynthetics):
        return synthetics.vectors
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
    """MoCHi eq. 1 with materialised synthetics: one more column of logits for each, and autograd."""
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
