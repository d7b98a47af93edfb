"""The loss and its own gradient, compared with the reference in tests/reference.py (materialised
synthetics, one long row of logits, autograd), closed forms, and finite differences.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast.loss import contrastive_loss
from mochi.contrast.negatives import SparseSynthetics, Synthetics
from mochi.contrast.rules import Candidates, Rule
from mochi.contrast.rules.mochi import MoCHi
from mochi.contrast.rules.moco import MoCo
from mochi.errors import UserError
from tests.reference import Given, mochi_loss, synthetic_vectors


def batch(
    num: int, dim: int, size: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(num, dim, generator=generator, dtype=dtype)
    key = F.normalize(torch.randn(num, dim, generator=generator, dtype=dtype), dim=-1)
    queue = F.normalize(torch.randn(size, dim, generator=generator, dtype=dtype), dim=-1)
    return raw, key, queue


def mochi_rule(num_hardest: int, num_pairs: int, num_query: int, **options: bool) -> Rule:
    if not num_pairs and not num_query:
        return MoCo()
    numbers = {"num_pair_synthetics": num_pairs, "num_query_synthetics": num_query}
    return MoCHi(num_hardest=num_hardest, **numbers, **options)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def draw_synthetics(
    rule: Rule, query: Tensor, queue: Tensor, excluded: Tensor | None = None
) -> list[Synthetics]:
    """Synthetics that the rule makes for these queries with `draws`."""
    similarity = query.detach() @ queue.T
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    masked = excluded is not None
    return rule.synthetics(Candidates(query.detach(), similarity, queue, masked, draws()))


def fused_and_reference(raw, key, queue, temperature, rule, excluded=None):
    """(loss, gradient) of the fused function and of the reference, for the same synthetics.

    The gradient is that of the unit queries. Normalising them would hide its part along the query.
    """
    query = F.normalize(raw, dim=-1).requires_grad_()
    fast = contrastive_loss(query, key, queue, temperature, rule, excluded, draws())
    (fast_grad,) = torch.autograd.grad(fast.loss, query)

    synthetics = draw_synthetics(rule or MoCo(), query, queue, excluded)
    vectors = [synthetic_vectors(query.detach(), queue, each) for each in synthetics]
    slow = mochi_loss(query, key, queue, temperature, vectors, excluded)
    (slow_grad,) = torch.autograd.grad(slow, query)
    return (fast.loss, fast_grad), (slow, slow_grad)


@settings(max_examples=60)
@given(
    num=st.integers(1, 5),
    dim=st.integers(2, 9),
    size=st.integers(2, 40),
    pairs=st.sampled_from([0, 1, 7, 60]),
    from_query=st.sampled_from([0, 1, 7, 60]),
    temperature=st.sampled_from([0.07, 0.2, 1.0]),
    data=st.data(),
)
def test_equals_the_reference_in_float64(
    num: int, dim: int, size: int, pairs: int, from_query: int, temperature: float, data: st.DataObject
) -> None:
    """Random sizes, s > N, N = K, s or s' = 0: loss and gradient to 1e-12."""
    num_hardest = data.draw(st.integers(2, size))
    raw, key, queue = batch(num, dim, size, seed=data.draw(st.integers(0, 1000)))
    rule = mochi_rule(num_hardest, pairs, from_query)
    (fast, fast_grad), (slow, slow_grad) = fused_and_reference(raw, key, queue, temperature, rule)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)
    # Where the loss is near zero, the gradient is a difference of vectors of length 1 / temperature
    # that almost cancel, in both implementations.
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-12, atol=1e-14 / temperature)


def test_equals_the_reference_in_float32() -> None:
    raw, key, queue = batch(32, 64, 4096, seed=0, dtype=torch.float32)
    rule = mochi_rule(256, 256, 64)
    (fast, fast_grad), (slow, slow_grad) = fused_and_reference(raw, key, queue, 0.2, rule)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-5, atol=1e-5 * slow_grad.abs().max().item())


def test_without_a_rule_the_loss_is_mocos() -> None:
    raw, key, queue = batch(4, 5, 11, seed=1)
    (fast, fast_grad), (slow, slow_grad) = fused_and_reference(raw, key, queue, 0.2, None)
    torch.testing.assert_close(fast, slow, rtol=1e-13, atol=0)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-12, atol=1e-15)


def test_excluded_negatives_are_in_neither_the_loss_nor_the_synthetics() -> None:
    raw, key, queue = batch(3, 5, 12, seed=2)
    excluded = torch.zeros(3, 12, dtype=torch.bool)
    excluded[0, ::2] = True
    rule = mochi_rule(8, 10, 10)
    (fast, fast_grad), (slow, slow_grad) = fused_and_reference(raw, key, queue, 0.2, rule, excluded)
    assert math.isfinite(fast.item())
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-11, atol=1e-13)
    for synthetic in draw_synthetics(rule, F.normalize(raw, dim=-1), queue, excluded):
        assert not excluded[0][synthetic.parents[0]].any()


def test_a_query_whose_whole_queue_is_excluded_has_no_loss() -> None:
    raw, key, queue = batch(1, 5, 12, seed=2)
    free = raw.clone().requires_grad_()
    excluded = torch.ones(1, 12, dtype=torch.bool)
    rule = mochi_rule(8, 10, 10)
    result = contrastive_loss(F.normalize(free, dim=-1), key, queue, 0.2, rule, excluded)
    result.loss.backward()
    assert result.loss.item() == 0
    assert free.grad is not None
    assert free.grad.abs().max() < 1e-15


@pytest.mark.parametrize("through_query", [False, True])
def test_gradient_by_finite_differences(through_query: bool) -> None:
    """With `through_query` h' moves with the query; otherwise it is fixed. Steps leave the unit sphere."""
    raw, key, queue = batch(2, 4, 9, seed=3)
    start = F.normalize(raw, dim=-1)
    rule = mochi_rule(4, 0, 6, through_query=through_query)
    (fixed,) = draw_synthetics(rule, start, queue)
    assert isinstance(fixed, SparseSynthetics)
    share = fixed.query_weight / (fixed.query_weight + fixed.weights[..., 0])
    negatives = queue[fixed.parents[..., 0]]

    def moving(query: Tensor) -> Tensor:
        inside = query if through_query else start
        vectors = F.normalize(
            share[..., None] * inside[:, None] + (1 - share[..., None]) * negatives, dim=-1
        )
        return mochi_loss(query, key, queue, 0.2, [vectors])

    numeric = torch.zeros_like(start)
    for i in range(start.numel()):
        step = torch.zeros_like(start).view(-1)
        step[i] = 1e-6
        step = step.view_as(start)
        numeric.view(-1)[i] = (moving(start + step) - moving(start - step)) / 2e-6
    query = start.clone().requires_grad_()
    contrastive_loss(query, key, queue, 0.2, rule, generator=draws()).loss.backward()
    torch.testing.assert_close(query.grad, numeric, rtol=1e-6, atol=1e-9)


def test_gradcheck_where_nothing_is_detached() -> None:
    """Synthetics from pairs do not contain the query, so gradcheck applies once the draws are fixed."""
    raw, key, queue = batch(2, 4, 9, seed=4)
    fixed = draw_synthetics(mochi_rule(4, 6, 0), F.normalize(raw, dim=-1), queue)

    def loss(free: Tensor) -> Tensor:
        return contrastive_loss(
            F.normalize(free, dim=-1), key, queue, 0.2, Given(make=lambda _: fixed)
        ).loss

    assert torch.autograd.gradcheck(loss, (raw.requires_grad_(),))


def test_closed_forms() -> None:
    """All rows equal: ln(1 + K), and ln(1 + K + s) with pairs, whose synthetics equal that row too."""
    row = F.normalize(torch.ones(1, 4, dtype=torch.float64), dim=-1)
    query, queue = row.expand(3, 4), row.expand(7, 4)
    assert contrastive_loss(query, query, queue, 0.2).loss.item() == pytest.approx(math.log(8), rel=1e-14)
    rule = mochi_rule(4, 5, 0)
    assert contrastive_loss(query, query, queue, 0.2, rule).loss.item() == pytest.approx(
        math.log(13), rel=1e-14
    )


def test_temperature_divides_synthetic_logits_too() -> None:
    """At two temperatures, against the reference that divides every column."""
    raw, key, queue = batch(3, 6, 20, seed=5)
    rule = mochi_rule(5, 8, 8)
    for temperature in (0.05, 0.5):
        (fast, _), (slow, _) = fused_and_reference(raw, key, queue, temperature, rule)
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)


def test_harder_negatives_make_a_larger_loss_and_are_reported() -> None:
    raw, key, queue = batch(8, 16, 64, seed=6)
    query = F.normalize(raw, dim=-1)
    plain = contrastive_loss(query, key, queue, 0.2)
    mixed = contrastive_loss(query, key, queue, 0.2, mochi_rule(16, 0, 32))
    assert mixed.loss > plain.loss
    assert (mixed.hardest_synthetic > mixed.hardest_negative).all()
    assert plain.hardest_synthetic.isneginf().all()
    torch.testing.assert_close(plain.hardest_negative, (query @ queue.T).amax(1))


def test_identical_images_at_a_small_temperature_stay_finite_under_autocast() -> None:
    """cosine 1 at temperature 0.02: e^50 overflows half precision; logits and softmax are float32."""
    raw, _, queue = batch(4, 8, 32, seed=7, dtype=torch.float32)
    free = raw.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        query = F.normalize(free, dim=-1)
        result = contrastive_loss(query.bfloat16(), query.detach().bfloat16(), queue, 0.02, None)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert math.isfinite(result.loss.item())
    assert free.grad is not None
    assert free.grad.isfinite().all()


def test_only_the_query_gets_a_gradient() -> None:
    raw, key, queue = batch(3, 6, 20, seed=8)
    key.requires_grad_()
    queue.requires_grad_()
    contrastive_loss(F.normalize(raw.requires_grad_(), dim=-1), key, queue, 0.2, None).loss.backward()
    assert key.grad is None
    assert queue.grad is None


def test_groups_of_queries_equal_the_whole_batch() -> None:
    """150 queries are three groups on a CPU, the last one smaller; excluded columns are split too."""
    raw, key, queue = batch(150, 6, 40, seed=9)
    excluded = torch.rand(150, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    query = F.normalize(raw, dim=-1)
    similarity = (query @ queue.T).masked_fill(excluded, -torch.inf)
    synthetics = draw_synthetics(mochi_rule(8, 12, 12), query, queue, excluded)
    calls: list[int] = []

    def mixed_of(rows: Tensor) -> list[Synthetics]:
        start = sum(calls)
        calls.append(len(rows))
        torch.testing.assert_close(rows, similarity[start : start + len(rows)])
        return [
            SparseSynthetics(*(None if each is None else each[start : start + len(rows)] for each in kind))
            for kind in synthetics
        ]

    grouped_raw, slow_raw = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    rule = Given(make=mixed_of)
    grouped = contrastive_loss(F.normalize(grouped_raw, dim=-1), key, queue, 0.2, rule, excluded)
    grouped.loss.backward()
    assert calls == [64, 64, 22]
    query = F.normalize(slow_raw, dim=-1)
    vectors = [synthetic_vectors(query.detach(), queue, each) for each in synthetics]
    slow = mochi_loss(query, key, queue, 0.2, vectors, excluded)
    slow.backward()
    torch.testing.assert_close(grouped.loss, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(grouped_raw.grad, slow_raw.grad, rtol=1e-11, atol=1e-15)


def test_autocast_does_not_change_the_loss() -> None:
    """Similarities, synthetics and the matrix product of the gradient stay in float32."""
    raw, key, queue = batch(5, 8, 24, seed=3, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        query = F.normalize(raw, dim=-1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rule = mochi_rule(6, 7, 5)
            loss = contrastive_loss(query, key, queue, 0.2, rule, generator=draws()).loss
        loss.backward()
        found.append((loss, query.grad))
    (plain, plain_gradient), (cast, cast_gradient) = found
    assert torch.equal(cast, plain)
    assert torch.equal(cast_gradient, plain_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Query, keys and queue alike: the loss is that of their values."""
    halves = [F.normalize(each, dim=-1).to(dtype) for each in batch(3, 8, 24, seed=10, dtype=torch.float32)]
    rule = mochi_rule(6, 7, 5)
    loss, expected = (
        contrastive_loss(query, key, queue, 0.2, rule, generator=draws()).loss
        for query, key, queue in (halves, [each.float() for each in halves])
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


UNIT = torch.eye(4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"query": torch.eye(4).int()},
            r"query: found torch.int32 of shape \(4, 4\); expected unit vectors",
        ),
        ({"query": torch.ones(4)}, r"query: found torch.float32 of shape \(4,\)"),
        ({"key": torch.eye(4)[:3]}, r"query, key, queue: found shapes \(4, 4\), \(3, 4\) and \(4, 4\)"),
        ({"queue": torch.ones(5, 3)}, r"found shapes \(4, 4\), \(4, 4\) and \(5, 3\); expected \(B, C\)"),
        ({"queue": torch.ones(0, 4)}, r"queue: .*at least one row"),
        ({"queue": torch.ones(4, 4, device="meta")}, "queue: found on meta; the queries are on cpu"),
        ({"temperature": 0.0}, "temperature: found 0.0; expected a number above 0"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"excluded": torch.ones(4, 4)}, "excluded: found torch.float32"),
        ({"excluded": torch.ones(4, dtype=torch.bool)}, r"expected bool of shape \(4, 4\)"),
        ({"rule": mochi_rule(5, 2, 2)}, r"num_hardest: found 5; expected 2 to 4 \(queue_size\)"),
    ],
)
def test_invalid_inputs_are_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"query": UNIT, "key": UNIT, "queue": UNIT, "temperature": 0.2} | changed
    with pytest.raises(UserError, match=message):
        contrastive_loss(**arguments)
