"""SynCo: MoCo with six types of synthetic negatives, each from one of a query's hardest negatives n.

    1 interpolated  a q + (1 - a) n,  a ~ U(0, 0.5)        4 noisy        n + N(0, sigma^2 I)
    2 extrapolated  q + b (n - q),    b ~ U(1, 1.5)        5 perturbed    n + delta q
    3 mixed         g n + (1 - g) m,  g ~ U(0, 1)          6 adversarial  n + eta sign(q)

all normalised to unit length, and constants for the gradient. Types 5 and 6 follow the gradient of q.n
with respect to n, which is q. Types 1 and 3 are MoCHi's. Types 1, 2, 3 and 5 are weighted sums of q and n,
so no vector is materialised; types 4 and 6 are computed for a few queries at a time.

Source: Giakoumoglou and Stathaki 2024, section 3; giakoumoglou/synco synco/builder.py, whose numbers are
the defaults.
Deviations from that code: a mix is of two different negatives; a type may have more synthetics than N;
`num_noisy` switches type 4 on and `num_perturbed` type 5, which that code swaps; the first rows of the
queue have length 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Candidates, at_least, check_pool
from mochi.contrast.rules.moco import MoCo

if TYPE_CHECKING:
    from mochi.contrast.negatives import Pool, Synthetics, VectorSynthetics


@dataclass(frozen=True, kw_only=True)
class SynCo(MoCo):
    """Six types of synthetic negatives around the hardest ones."""

    warmup_epochs: int = 10
    """Initial epochs that train with MoCo's loss instead."""
    num_hardest: int = 1024
    """N, the pool of each query."""
    num_interpolated: int = 256
    """Type 1: points between the query and a negative, nearer to the negative."""
    num_extrapolated: int = 256
    """Type 2: points beyond a negative, on the line from the query."""
    num_mixed: int = 256
    """Type 3: points between two negatives."""
    num_noisy: int = 64
    """Type 4: negatives with Gaussian noise."""
    num_perturbed: int = 64
    """Type 5: negatives moved towards the query."""
    num_adversarial: int = 64
    """Type 6: negatives moved along the sign of the query."""
    noise: float = 0.01
    """sigma, the standard deviation of the noise of type 4."""
    perturbation: float = 0.01
    """delta, the step of type 5 along the query."""
    adversarial_step: float = 0.01
    """eta, the step of type 6 in each coordinate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, **self._numbers)
        if not self.num_synthetics:
            raise ValueError(
                f"{', '.join(self._numbers)}: found all 0, which is plain MoCo; expected a number above 0, "
                "or the rule moco"
            )
        for name in ("noise", "perturbation", "adversarial_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)}; expected a number above 0")

    @property
    def _numbers(self) -> dict[str, int]:
        names = ("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial")
        return {f"num_{name}": getattr(self, f"num_{name}") for name in names}

    def check(self, queue_size: int) -> None:
        """See `Rule.check`."""
        check_pool(self.num_hardest, 2 if self.num_mixed else 1, queue_size)

    @property
    def num_synthetics(self) -> int:
        """Synthetics of all types."""
        return sum(self._numbers.values())

    @property
    def makes_vectors(self) -> bool:
        """True with synthetics of type 4 or 6."""
        return bool(self.num_noisy or self.num_adversarial)

    def synthetics(self, candidates: Candidates) -> list[Synthetics]:
        """One entry for each type with a number above 0, in order."""
        from mochi.contrast.negatives import (
            draw_parents,
            hardest,
            mix_pairs,
            mix_with_query,
            sum_with_query,
            uniform,
        )

        query, similarity, queue, some_excluded, generator = candidates
        pool = hardest(similarity, self.num_hardest, some_excluded=some_excluded)
        synthetics: list[Synthetics] = []
        if self.num_interpolated:
            synthetics.append(mix_with_query(similarity, pool, self.num_interpolated, generator))
        if self.num_extrapolated:
            parents = draw_parents(pool, self.num_extrapolated, generator)
            beta = 1 + 0.5 * uniform(parents.shape, query, generator)
            synthetics.append(sum_with_query(similarity.gather(1, parents), parents, 1 - beta, beta))
        if self.num_mixed:
            synthetics.append(mix_pairs(queue, pool, self.num_mixed, generator))
        if self.num_noisy:
            synthetics.append(self._noisy(candidates, pool))
        if self.num_perturbed:
            parents = draw_parents(pool, self.num_perturbed, generator)
            x = similarity.gather(1, parents)
            synthetics.append(sum_with_query(x, parents, self.perturbation, 1.0))
        if self.num_adversarial:
            synthetics.append(self._adversarial(candidates, pool))
        return synthetics

    def _noisy(self, candidates: Candidates, pool: Pool) -> VectorSynthetics:
        import torch

        from mochi.contrast.negatives import VectorSynthetics, draw_parents

        query, _, queue, _, generator = candidates
        parents = draw_parents(pool, self.num_noisy, generator)
        shape = (*parents.shape, queue.shape[1])
        noise = torch.randn(shape, generator=generator, device=query.device, dtype=query.dtype)
        vectors = queue[parents] + self.noise * noise
        return VectorSynthetics(parents[..., None], torch.nn.functional.normalize(vectors, dim=-1))

    def _adversarial(self, candidates: Candidates, pool: Pool) -> VectorSynthetics:
        import torch

        from mochi.contrast.negatives import VectorSynthetics, draw_parents

        query, _, queue, _, generator = candidates
        parents = draw_parents(pool, self.num_adversarial, generator)
        vectors = queue[parents] + self.adversarial_step * query.detach().sign()[:, None]
        return VectorSynthetics(parents[..., None], torch.nn.functional.normalize(vectors, dim=-1))
