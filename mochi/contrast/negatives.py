r"""Synthetic hard negatives as sparse combinations of existing logits (MoCHi section 3).

A synthetic negative is mixed from rows of the queue (its *parents*) and perhaps the query. Its similarity
to the query is then a weighted sum of similarities that MoCo computes anyway, and its gradient is a
weighted sum of the same rows. A rule that mixes (`mochi.contrast.rules`) therefore returns columns and
weights, not vectors. For a synthetic h with parents n_i

    q . h  =  w_q q.q + sum_i w_i (q . n_i),        d(q . h)/dq  =  v_q q + sum_i v_i n_i

with v = w if the synthetic is a constant for the gradient, which is the default.

Shapes: B queries, K queue rows, C embedding, N hardest, S synthetics of one kind, P parents of each.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_QUERY_SHARE = 0.5
"""b ~ U(0, 0.5): in a query mix the negative always dominates (MoCHi section 3.3)."""

# Pairs whose products are computed at once: on a CPU their gathered rows stay in its cache, on a GPU they
# need little memory.
_PAIRS_AT_ONCE = {"cpu": 1024, "gpu": 32768}


class Synthetics(Protocol):
    """Synthetic negatives of one kind, for each query of a batch."""

    @property
    def parents(self) -> Tensor:
        """(B, S, P) columns of the queue."""

    def similarity(self, query: Tensor, similarity: Tensor) -> Tensor:
        """q . h from the queries (B, C) and their similarities (B, K) to the queue -> (B, S)."""

    def scatter_to_parents(self, p_h: Tensor, p: Tensor) -> None:
        """Add each synthetic's weight p_h (B, S) times v_i to its parents' columns of `p` (B, K)."""

    def rest_of_gradient(self, p_h: Tensor, query: Tensor) -> Tensor | None:
        """(B, C) the part of sum_h p_h dh/dq outside the queue's rows; None: zero."""


class SparseSynthetics(NamedTuple):
    """Weighted sums of rows of the queue, and perhaps of the query."""

    parents: Tensor  # (B, S, P) columns of the queue
    weights: Tensor  # (B, S, P) w_i
    query_weight: Tensor | None  # (B, S) w_q; None if the query is not a parent
    gradient_weights: Tensor  # (B, S, P) v_i
    gradient_query_weight: Tensor | None  # (B, S) v_q

    def similarity(self, query: Tensor, similarity: Tensor) -> Tensor:
        """w_q + sum_i w_i (q . n_i), because queries have length 1."""
        del query
        rows = similarity.gather(1, self.parents.flatten(1)).view_as(self.weights)
        mixed = (self.weights * rows).sum(-1)
        return mixed if self.query_weight is None else mixed + self.query_weight

    def scatter_to_parents(self, p_h: Tensor, p: Tensor) -> None:
        """See `Synthetics`."""
        p.scatter_add_(1, self.parents.flatten(1), (p_h[..., None] * self.gradient_weights).flatten(1))

    def rest_of_gradient(self, p_h: Tensor, query: Tensor) -> Tensor | None:
        """sum_h p_h v_q q, the part of the query."""
        if self.gradient_query_weight is None:
            return None
        return (p_h * self.gradient_query_weight).sum(1)[:, None] * query


class VectorSynthetics(NamedTuple):
    """Vectors, for synthetics that are not sums of rows; constants for the gradient."""

    parents: Tensor  # (B, S, P) columns of the queue that they come from
    vectors: Tensor  # (B, S, C) of length 1

    def similarity(self, query: Tensor, similarity: Tensor) -> Tensor:
        """q . h, -inf where a parent is excluded, as for a weighted sum."""
        mixed = torch.einsum("bc,bsc->bs", query, self.vectors)
        rows = similarity.gather(1, self.parents.flatten(1)).view_as(self.parents)
        return mixed.masked_fill(rows.isneginf().any(-1), -torch.inf)

    def scatter_to_parents(self, p_h: Tensor, p: Tensor) -> None:
        """Do nothing: the whole gradient is in `rest_of_gradient`."""

    def rest_of_gradient(self, p_h: Tensor, query: Tensor) -> Tensor | None:
        """sum_h p_h h."""
        del query
        return torch.einsum("bs,bsc->bc", p_h, self.vectors)


class Pool(NamedTuple):
    """The hardest negatives of each query, from which synthetics are drawn."""

    columns: Tensor  # (B, N) columns of the queue
    size: Tensor  # (B, 1) how many of a row's first columns may be drawn


def hardest(similarity: Tensor, num_hardest: int, *, some_excluded: bool = False) -> Pool:
    """The N real negatives most similar to each query.

    Exact, in two steps that compare far fewer numbers than one `topk` over K: each of the N largest is
    in one of the N blocks with the largest maxima.

    Args:
        similarity: (B, K), -inf for columns that may not be chosen.
        num_hardest: N <= K.
        some_excluded: whether there are such columns; they are then sorted last.
    """
    if some_excluded:
        values, columns = similarity.topk(num_hardest, sorted=True)
        return Pool(columns, (values > -torch.inf).sum(1, keepdim=True).clamp(min=1))
    everything = similarity.new_full((len(similarity), 1), num_hardest, dtype=torch.long)
    size = similarity.shape[1]
    block = round((size / num_hardest) ** 0.5)
    if block < 2 or size % block:
        return Pool(similarity.topk(num_hardest, sorted=False).indices, everything)
    maxima = similarity.unflatten(1, (-1, block)).amax(-1)  # (B, K/b)
    best = maxima.topk(num_hardest, sorted=False).indices  # (B, N)
    offsets = torch.arange(block, device=similarity.device)
    candidates = (best[..., None] * block + offsets).flatten(1)  # (B, N b)
    winners = similarity.gather(1, candidates).topk(num_hardest, sorted=False).indices
    return Pool(candidates.gather(1, winners), everything)


def mix_pairs(queue: Tensor, pool: Pool, num: int, generator: torch.Generator | None) -> SparseSynthetics:
    r"""Mix pairs of each query's hardest negatives: s points between them (MoCHi section 3.2).

    h = (a n_i + (1 - a) n_j) / r with r = ||a n_i + (1 - a) n_j||, a ~ U(0, 1), i != j from the pool.
    Both are unit vectors, so r^2 = a^2 + (1-a)^2 + 2 a (1-a) n_i.n_j, w_i = a / r and w_j = (1-a) / r.

    Source: Kalantidis et al. 2020, section 3.2.
    Deviation: i and j are always distinct; the paper does not say (i = j would not be a mix).

    Args:
        queue: (K, C) unit keys.
        pool: the hardest negatives of each query.
        num: s, may exceed N.
        generator: the only source of randomness; None: torch's global one of the device.
    """
    first = _draw(pool.size, num, generator)  # (B, s), positions in the pool
    shift = 1 + _draw((pool.size - 1).clamp(min=1), num, generator)
    second = (first + shift) % pool.size
    parents = torch.stack((pool.columns.gather(1, first), pool.columns.gather(1, second)), -1)
    share = uniform(first.shape, queue, generator)
    rest = 1 - share
    products = _pair_products(queue, parents)
    length = (share * share + rest * rest + 2 * share * rest * products).sqrt()
    weights = torch.stack((share / length, rest / length), -1)
    return SparseSynthetics(parents, weights, None, weights, None)


def mix_with_query(
    similarity: Tensor,
    pool: Pool,
    num: int,
    generator: torch.Generator | None,
    *,
    through_query: bool = False,
) -> SparseSynthetics:
    r"""Mix each query with its own hardest negatives: s' points nearer to it than they are (section 3.3).

    h' = (b q + (1 - b) n_j) / r with r = ||b q + (1 - b) n_j||, b ~ U(0, 0.5), j from the pool. With
    x = q.n_j, r^2 = b^2 + (1-b)^2 + 2 b (1-b) x, w_q = b / r and w_n = (1-b) / r: no new product is needed.

    With `through_query` the gradient also flows through the q inside h'. Then
    d(q.h')/dq = h' + w_q (q - (q.h') h'), so with c = 1 - w_q (q.h'): v_n = c w_n and v_q = c w_q + w_q.

    Source: Kalantidis et al. 2020, section 3.3.
    Deviation: none; the paper does not specify the gradient; by default h' is a constant.

    Args:
        similarity: (B, K), -inf where excluded.
        pool: the hardest negatives of each query.
        num: s', may exceed N.
        generator: the only source of randomness; None: torch's global one of the device.
        through_query: let the gradient flow through h'.
    """
    parents = draw_parents(pool, num, generator)
    x = similarity.gather(1, parents)
    share = MAX_QUERY_SHARE * uniform(x.shape, x, generator)
    return sum_with_query(x, parents, share, 1 - share, through_query=through_query)


def sum_with_query(
    x: Tensor, parents: Tensor, share: Tensor | float, rest: Tensor | float, *, through_query: bool = False
) -> SparseSynthetics:
    """(share q + rest n) / r with r its length, from x = q.n and the columns of n, (B, S) each."""
    # An empty pool gives excluded columns: the weights are finite, the similarity stays -inf.
    x = x.clamp(min=-1) if through_query else x.detach().clamp(min=-1)
    length = (share * share + rest * rest + 2 * share * rest * x).sqrt()
    query_weight, weight = share / length, rest / length
    gradient_query_weight, gradient_weight = query_weight, weight
    if through_query:
        c = 1 - query_weight * (query_weight + weight * x)  # see `mix_with_query`
        gradient_weight = c * weight
        gradient_query_weight = c * query_weight + query_weight
    return SparseSynthetics(
        parents[..., None],
        weight[..., None],
        query_weight,
        gradient_weight[..., None],
        gradient_query_weight,
    )


def draw_parents(pool: Pool, num: int, generator: torch.Generator | None) -> Tensor:
    """(B, num) columns of the queue, uniform over each query's pool, with replacement."""
    return pool.columns.gather(1, _draw(pool.size, num, generator))


def _draw(size: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    """(B, num) integers, uniform in [0, size) for each row of `size` (B, 1)."""
    u = torch.rand(len(size), num, generator=generator, device=size.device, dtype=torch.float64)
    return (u * size).long()


def uniform(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """U(0, 1), open at both ends, in the precision of `like`."""
    drawn = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
    return drawn.clamp_(min=torch.finfo(like.dtype).tiny)


def _pair_products(queue: Tensor, parents: Tensor) -> Tensor:
    """n_i . n_j for parents (B, s, 2) -> (B, s), from the rows of some pairs at a time."""
    pairs = parents.flatten(0, 1)
    products = [
        (F.embedding(some[:, 0], queue) * F.embedding(some[:, 1], queue)).sum(-1)
        for some in pairs.split(_PAIRS_AT_ONCE["cpu" if queue.device.type == "cpu" else "gpu"])
    ]
    return torch.cat(products).view(parents.shape[:2])
