"""MoCHi: MoCo with synthetic negatives, mixed for each query from its hardest ones.

s of them from pairs of the N hardest, s' from one of these and the query. No vector is materialised: see
`mochi.contrast.negatives` for the equations.

Source: Kalantidis et al. 2020, eq. 1, sections 3.2 and 3.3. No official code is public.
Deviations: a pair always has two different negatives; the query inside a mix is a constant for the gradient
unless `through_query` is set (the paper specifies neither).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mochi.contrast.rules import Candidates, at_least, check_pool
from mochi.contrast.rules.moco import MoCo

if TYPE_CHECKING:
    from mochi.contrast.negatives import Synthetics


@dataclass(frozen=True, kw_only=True)
class MoCHi(MoCo):
    """Hard negative mixing."""

    num_hardest: int
    """N, the hardest negatives of each query, from which synthetics are mixed; at most `queue_size`."""
    num_pair_synthetics: int
    """s, synthetics of each query from pairs of its hardest negatives; may exceed N."""
    num_query_synthetics: int
    """s', synthetics of each query from one of these and the query; may exceed N."""
    through_query: bool = False
    """Let gradients flow into the query inside a query mix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            0,
            num_pair_synthetics=self.num_pair_synthetics,
            num_query_synthetics=self.num_query_synthetics,
        )
        if not self.num_synthetics:
            raise ValueError(
                "num_pair_synthetics, num_query_synthetics: found 0 and 0, which is plain MoCo; expected a "
                "number above 0, or the rule moco"
            )

    def check(self, queue_size: int) -> None:
        """See `Rule.check`."""
        check_pool(self.num_hardest, 2 if self.num_pair_synthetics else 1, queue_size)

    @property
    def num_synthetics(self) -> int:
        """s + s'."""
        return self.num_pair_synthetics + self.num_query_synthetics

    def synthetics(self, candidates: Candidates) -> list[Synthetics]:
        """Mixes of pairs, then mixes with the query, from one pool."""
        from mochi.contrast.negatives import hardest, mix_pairs, mix_with_query

        _, similarity, queue, some_excluded, generator = candidates
        pool = hardest(similarity, self.num_hardest, some_excluded=some_excluded)
        synthetics: list[Synthetics] = []
        if self.num_pair_synthetics:
            synthetics.append(mix_pairs(queue, pool, self.num_pair_synthetics, generator))
        if self.num_query_synthetics:
            num, through = self.num_query_synthetics, self.through_query
            synthetics.append(mix_with_query(similarity, pool, num, generator, through_query=through))
        return synthetics
