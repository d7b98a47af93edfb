"""InfoNCE: every negative counts only by its similarity (MoCo).

    L = -log( e^{q.k/tau} / (e^{q.k/tau} + sum_n e^{q.n/tau}) )

Source: He et al. 2020, eq. 1; facebookresearch/moco moco/builder.py and main_moco.py.
Deviation: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Rule, Similarities, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MoCo(Rule):
    """The cross-entropy of recognising the key among the negatives."""

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        """log(1 + sum_n e^{(q.n - q.k)/tau})."""
        negatives = (similarity / temperature).logsumexp(1)
        return negatives.logaddexp(positive / temperature) - positive / temperature

    def fused(self, similarities: Similarities, temperature: float) -> Weights:
        """A negative's derivative is its softmax weight; the positive's is its softmax weight minus 1."""
        positive, negatives, hardest, _ = similarities
        top = positive.maximum(hardest)
        # The softmax without its denominator; the rows of the gradient are divided by it at the end.
        for each in negatives:
            each.sub_(top[:, None]).div_(temperature).exp_()
        p_positive = ((positive - top) / temperature).exp()
        total = negatives[0].sum(1) + p_positive + sum(each.sum(1) for each in negatives[1:])
        loss = total.log() + (top - positive) / temperature
        return Weights(loss, p_positive - total, total)
