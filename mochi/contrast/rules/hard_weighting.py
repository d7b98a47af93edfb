"""Contrastive learning with hard negative samples: the more similar a negative, the more it counts.

The debiased loss with negatives weighted by their similarity (importance weights instead of sampling):

    w_n = e^{beta q.n/tau} / mean_m e^{beta q.m/tau}
    g = max( (sum_n w_n e^{q.n/tau} - M tau+ e^{q.k/tau}) / (1 - tau+),  M e^{-1/tau} )
    L = -log( e^{q.k/tau} / (e^{q.k/tau} + g) )

Source: Robinson et al. 2021, section 3 and appendix (objective in code); joshr17/HCL image/main.py.
Deviations: those of `debiased`. As in the public code, tau divides the similarity in w too, and the
gradient flows through w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Similarities, Weights
from mochi.contrast.rules.debiased import Debiased

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Columns processed at once, so that no second (B, K) buffer is needed.
_COLUMNS = 4096


@dataclass(frozen=True, kw_only=True)
class HardWeighting(Debiased):
    """Importance weights for hard negatives."""

    concentration: float = 1.0
    """beta, above 0; as it approaches 0 the rule becomes `debiased`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.concentration < math.inf:
            raise ValueError(
                f"concentration: found {self.concentration}; expected more than 0, or the rule debiased"
            )

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        """The debiased loss of weighted negatives."""
        num = (similarity != -math.inf).sum(1)
        top = positive.maximum(similarity.amax(1)).detach()
        weights = num[:, None] * (self.concentration * similarity / temperature).softmax(1)
        negative_sum = (weights * ((similarity - top[:, None]) / temperature).exp()).sum(1)
        return self._loss(positive, negative_sum, top, num, temperature)

    def fused(self, similarities: Similarities, temperature: float) -> Weights:
        """With a = softmax((1 + beta) x / tau) and b = softmax(beta x / tau), the weighted sum G has

        tau dG/dx_n = G ((1 + beta) a_n - beta b_n).
        """
        positive, negatives, hardest, num = similarities
        beta = self.concentration
        parts = [part for each in negatives for part in each.split(_COLUMNS, dim=1)]
        weight_sum, product_sum = positive * 0, positive * 0
        for part in parts:
            part.sub_(hardest[:, None]).div_(temperature)
            weights, exponential = _exponentials(part, beta)
            weight_sum += weights.sum(1)
            product_sum += weights.mul(exponential).sum(1)
        top = positive.maximum(hardest)
        negative_sum = num * product_sum / weight_sum * ((hardest - top) / temperature).exp()
        result, slope = self._weights(positive, negative_sum, top, num, temperature)
        by_product = (slope * negative_sum * (1 + beta) / product_sum)[:, None]
        by_weight = (slope * negative_sum * beta / weight_sum)[:, None]
        for part in parts:
            weights, exponential = _exponentials(part, beta)
            part.copy_(exponential.mul(by_product).sub_(by_weight).mul_(weights))
        return result

    def measure(self, positive: Tensor, similarity: Tensor, temperature: float) -> Mapping[str, Tensor]:
        """Those of `debiased`, and the effective number of negatives: (sum w)^2 / sum w^2."""
        weights = (self.concentration * similarity / temperature).softmax(1)
        return {
            **super().measure(positive, similarity, temperature),
            "effective_negatives": 1 / weights.square().sum(1),
        }


def _exponentials(logits: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """e^{beta x} and e^x."""
    exponential = logits.exp()
    return (exponential if beta == 1 else (beta * logits).exp()), exponential
