"""Synthetic negatives: weights compared with vectors mixed one by one by the paper's formulas, pools with a
sort, and properties that distinguish the paper's rule from common misreadings.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mochi.contrast.negatives import (
    MAX_QUERY_SHARE,
    VectorSynthetics,
    hardest,
    mix_pairs,
    mix_with_query,
    sum_with_query,
    uniform,
)
from tests.reference import mixed_pair, mixed_with_query, synthetic_vectors


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(2, 300), st.data())
def test_hardest_are_the_largest_of_each_query(num_queries: int, size: int, data: st.DataObject) -> None:
    num_hardest = data.draw(st.integers(1, size))
    similarity = torch.rand(num_queries, size, generator=rng(size))
    pool = hardest(similarity, num_hardest)
    for row, columns in zip(similarity, pool.columns, strict=True):
        assert len(set(columns.tolist())) == num_hardest
        assert sorted(row[columns].tolist()) == sorted(row.tolist())[-num_hardest:]
    assert (pool.size == num_hardest).all()


@pytest.mark.parametrize(("size", "num_hardest"), [(4096, 256), (4096, 64), (65536, 1024), (1000, 10)])
def test_the_two_step_selection_equals_a_plain_topk(size: int, num_hardest: int) -> None:
    similarity = torch.randn(3, size, generator=rng(1))
    expected = similarity.topk(num_hardest).indices.sort().values
    assert torch.equal(hardest(similarity, num_hardest).columns.sort().values, expected)


def test_excluded_columns_rank_last_and_are_not_counted() -> None:
    similarity = torch.rand(2, 6, generator=rng())
    similarity[0, [1, 2, 3, 4]] = -torch.inf
    pool = hardest(similarity, 4, some_excluded=True)
    assert pool.size.flatten().tolist() == [2, 4]
    assert set(pool.columns[0, :2].tolist()) == {0, 5}


def test_pairs_equal_the_papers_vectors() -> None:
    query, queue = unit(3, 4), unit(20, 4, seed=1)
    pool = hardest(query @ queue.T, 5)
    synthetics = mix_pairs(queue, pool, num=12, generator=rng())  # s = 12 > N = 5
    vectors = synthetic_vectors(query, queue, synthetics)
    assert vectors.shape == (3, 12, 4)
    shares = synthetics.weights / synthetics.weights.sum(-1, keepdim=True)
    for b in range(3):
        for s in range(12):
            first, second = queue[synthetics.parents[b, s]]
            expected = mixed_pair(first, second, shares[b, s, 0].item())
            torch.testing.assert_close(vectors[b, s], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        synthetics.similarity(query, query @ queue.T), torch.einsum("bc,bsc->bs", query, vectors)
    )


def test_query_mixes_equal_the_papers_vectors() -> None:
    query, queue = unit(3, 4), unit(20, 4, seed=1)
    similarity = query @ queue.T
    synthetics = mix_with_query(similarity, hardest(similarity, 5), num=12, generator=rng())
    vectors = synthetic_vectors(query, queue, synthetics)
    assert synthetics.query_weight is not None
    shares = synthetics.query_weight / (synthetics.query_weight + synthetics.weights[..., 0])
    for b in range(3):
        for s in range(12):
            expected = mixed_with_query(query[b], queue[synthetics.parents[b, s, 0]], shares[b, s].item())
            torch.testing.assert_close(vectors[b, s], expected, rtol=1e-12, atol=1e-14)
    assert ((shares > 0) & (shares < MAX_QUERY_SHARE)).all()


@pytest.mark.parametrize("num_hardest", [2, 6])
def test_parents_are_from_the_querys_pool_and_pairs_are_distinct(num_hardest: int) -> None:
    query, queue = unit(4, 8), unit(64, 8, seed=1)
    similarity = query @ queue.T
    pool = hardest(similarity, num_hardest)
    pairs = mix_pairs(queue, pool, num=200, generator=rng())
    mixes = mix_with_query(similarity, pool, num=200, generator=rng())
    for b in range(4):
        own = set(similarity[b].topk(num_hardest).indices.tolist())
        assert set(pairs.parents[b].flatten().tolist()) == own
        assert set(mixes.parents[b].flatten().tolist()) == own
    assert (pairs.parents[..., 0] != pairs.parents[..., 1]).all()


def test_the_negative_dominates_a_query_mix() -> None:
    """n_j . h' >= q . h' for every draw if b <= 0.5 is the share of the query, for none if it were that of
    n_j.
    """
    query, queue = unit(8, 16), unit(256, 16, seed=1)
    similarity = query @ queue.T
    synthetics = mix_with_query(similarity, hardest(similarity, 32), num=500, generator=rng())
    vectors = synthetic_vectors(query, queue, synthetics)
    to_negative = torch.einsum("bsc,bsc->bs", queue[synthetics.parents[..., 0]], vectors)
    to_query = torch.einsum("bc,bsc->bs", query, vectors)
    assert (to_negative >= to_query).all()
    # And every mix is harder than its negative.
    assert (to_query >= similarity.gather(1, synthetics.parents[..., 0])).all()


def test_draws_are_uniform() -> None:
    """20,000 draws: shares, parents and ordered pairs of parents are near their expectations."""
    query, queue = unit(1, 16), unit(64, 16, seed=1)
    pool = hardest(query @ queue.T, 8)
    pairs = mix_pairs(queue, pool, num=20_000, generator=rng())
    shares = (pairs.weights[..., 0] / pairs.weights.sum(-1)).flatten()
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.std() - 12**-0.5) < 0.01
    counts = torch.bincount(pairs.parents.flatten(), minlength=64)[pool.columns[0]]
    assert (counts / 40_000 - 1 / 8).abs().max() < 0.01
    first, second = pairs.parents[0].T
    together = torch.bincount(first * 64 + second, minlength=64 * 64).view(64, 64)
    together = together[pool.columns[0]][:, pool.columns[0]]
    expected = (1 - torch.eye(8)) / 56
    assert (together / 20_000 - expected).abs().max() < 0.005


def test_equal_generators_give_equal_synthetics() -> None:
    queue = unit(64, 16)
    pool = hardest(unit(2, 16, seed=1) @ queue.T, 8)
    once, again, other = (mix_pairs(queue, pool, 9, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(once.parents, again.parents)
    assert torch.equal(once.weights, again.weights)
    assert not torch.equal(once.weights, other.weights)


@pytest.mark.parametrize("through_query", [False, True])
def test_an_excluded_parent_and_rounding_leave_weights_finite(through_query: bool) -> None:
    """A product of unit vectors may be below -1 by rounding, and is -inf for an excluded column."""
    x = torch.tensor([[-torch.inf, -1 - 1e-7, -1.0]], dtype=torch.float64)
    parents = torch.zeros(1, 3, dtype=torch.long)
    mixes = sum_with_query(x, parents, 0.5 - 1e-5, 0.5 + 1e-5, through_query=through_query)
    assert mixes.query_weight is not None
    assert mixes.gradient_query_weight is not None
    for each in (mixes.query_weight, mixes.weights, mixes.gradient_weights, mixes.gradient_query_weight):
        assert each.isfinite().all()
        assert (each == each[0, -1]).all()


def test_shares_are_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.rand gives 0 once in 2^24 draws."""

    def zeros(shape: torch.Size, *, generator: None, **kinds: Any) -> torch.Tensor:
        assert generator is None
        return torch.zeros(shape, **kinds)

    monkeypatch.setattr(torch, "rand", zeros)
    drawn = uniform(torch.Size((2, 3)), torch.zeros((), dtype=torch.float32), None)
    assert (drawn > 0).all()


def test_a_vector_with_an_excluded_parent_is_excluded() -> None:
    """As a weighted sum is: any similarity of -inf gives -inf."""
    query, vectors = unit(2, 5), unit(2, 3, 5, seed=1)
    similarity = torch.tensor([[0.1, -torch.inf, 0.2], [-torch.inf, 0.1, 0.2]], dtype=torch.float64)
    parents = torch.tensor([[[0, 2], [2, 1], [1, 1]], [[1, 1], [2, 1], [0, 1]]])
    expected = (vectors * query[:, None]).sum(-1)
    expected[0, 1:] = -torch.inf
    expected[1, 2] = -torch.inf
    mixed = VectorSynthetics(parents, vectors).similarity(query, similarity)
    torch.testing.assert_close(mixed, expected)
