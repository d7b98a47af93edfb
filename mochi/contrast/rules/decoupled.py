"""Decoupled contrastive learning: the positive is removed from the denominator.

    L = -q.k/tau + log( sum_n e^{q.n/tau} )

With the positive in the denominator, a query close to its key learns little from its negatives.

Source: Yeh et al. 2021, eq. 6; lightly/loss/dcl_loss.py (`DCLLoss`).
Deviations: the negatives are the queue's, not the batch's; the loss is not symmetrised over the two views,
as in MoCo; without the weights of the variant DCLW, which depend on the other queries of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Rule, Similarities, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Decoupled(Rule):
    """Repulsion that does not depend on the positive. The loss may be negative."""

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        """Eq. 6."""
        return (similarity / temperature).logsumexp(1) - positive / temperature

    def fused(self, similarities: Similarities, temperature: float) -> Weights:
        """A negative's derivative is its softmax weight among the negatives; the positive's is -1."""
        positive, negatives, hardest, _ = similarities
        for each in negatives:
            each.sub_(hardest[:, None]).div_(temperature).exp_()
        total = negatives[0].sum(1) + sum(each.sum(1) for each in negatives[1:])
        loss = total.log() + (hardest - positive) / temperature
        return Weights(loss, -total, total)
