"""Debiased contrastive learning: subtract the expected contribution of negatives of the query's class.

A fraction tau+ of the M negatives is expected to look like the positive:

    g = max( (sum_n e^{q.n/tau} - M tau+ e^{q.k/tau}) / (1 - tau+),  M e^{-1/tau} )
    L = -log( e^{q.k/tau} / (e^{q.k/tau} + g) )

The second argument is the smallest possible sum over M negatives.

Source: Chuang et al. 2020, section 4 (the estimator g and its loss); chingyaoc/DCL main.py.
Deviations: the negatives are the queue's, not the batch's, and M counts those that no mask excludes; the
estimate uses a single positive, as in the public code; exponentials cannot overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Rule, Similarities, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Debiased(Rule):
    """A correction for false negatives that needs no labels."""

    positive_prior: float = 0.1
    """tau+, the share of negatives of the query's class: one divided by the number of balanced classes.
    0.1 in the public code (STL-10)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.positive_prior < 1:
            raise ValueError(f"positive_prior: found {self.positive_prior}; expected 0 or more and below 1")

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        """The equation above, with every exponential divided by the largest."""
        top = positive.maximum(similarity.amax(1)).detach()
        negative_sum = ((similarity - top[:, None]) / temperature).exp().sum(1)
        return self._loss(positive, negative_sum, top, _count(similarity), temperature)

    def fused(self, similarities: Similarities, temperature: float) -> Weights:
        """As for MoCo, but negatives' weights are divided by 1 - tau+, and 0 where g is at its minimum."""
        positive, negatives, hardest, num = similarities
        top = positive.maximum(hardest)
        for each in negatives:
            each.sub_(top[:, None]).div_(temperature).exp_()
        negative_sum = negatives[0].sum(1) + sum(each.sum(1) for each in negatives[1:])
        weights, slope = self._weights(positive, negative_sum, top, num, temperature)
        for each in negatives:
            each.mul_(slope[:, None])
        return weights

    def measure(self, positive: Tensor, similarity: Tensor, temperature: float) -> Mapping[str, Tensor]:
        """The fraction of queries whose g is at its minimum, so that negatives give no gradient."""
        top = positive.maximum(similarity.amax(1))
        negative_sum = ((similarity - top[:, None]) / temperature).exp().sum(1)
        estimate, minimum = self._estimate(positive, negative_sum, top, _count(similarity), temperature)
        return {"debiased_at_minimum": (estimate <= minimum).float()}

    def _estimate(
        self, positive: Tensor, negative_sum: Tensor, top: Tensor, num: Tensor | int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The two arguments of the maximum in g, (B,) each, divided by e^{top/tau} like `negative_sum`."""
        positive_exp = ((positive - top) / temperature).exp()
        estimate = (negative_sum - self.positive_prior * (num * positive_exp)) / (1 - self.positive_prior)
        return estimate, num * ((-1 - top) / temperature).exp()

    def _loss(
        self, positive: Tensor, negative_sum: Tensor, top: Tensor, num: Tensor | int, temperature: float
    ) -> Tensor:
        estimate, minimum = self._estimate(positive, negative_sum, top, num, temperature)
        positive_exp = ((positive - top) / temperature).exp()
        return (positive_exp + estimate.maximum(minimum)).log() + (top - positive) / temperature

    def _weights(
        self, positive: Tensor, negative_sum: Tensor, top: Tensor, num: Tensor | int, temperature: float
    ) -> tuple[Weights, Tensor]:
        """The loss and its derivatives; and (B,) the derivative of g with respect to `negative_sum`."""
        estimate, minimum = self._estimate(positive, negative_sum, top, num, temperature)
        positive_exp = ((positive - top) / temperature).exp()
        total = positive_exp + estimate.maximum(minimum)
        slope = (estimate > minimum).to(total.dtype) / (1 - self.positive_prior)
        loss = total.log() + (top - positive) / temperature
        by_positive = positive_exp * (1 - slope * self.positive_prior * num) - total
        return Weights(loss, by_positive, total), slope


def _count(similarity: Tensor) -> Tensor:
    """(B,) how many negatives no mask excludes."""
    return (similarity != -math.inf).sum(1)
