"""The measurements of figures 2 and 3 against loops over queries and negatives, with and without oracle."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast import diagnosis
from mochi.contrast.diagnosis import (
    false_negatives,
    matching_probabilities,
    num_hardest,
    rule_measurements,
)
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.moco import Step
from mochi.contrast.negatives import Synthetics, hardest, mix_pairs, mix_with_query
from mochi.contrast.rules.hard_weighting import HardWeighting
from mochi.contrast.rules.mochi import MoCHi
from tests.reference import Given

LABELS = torch.tensor([0, 1, -1])
QUEUE_LABELS = torch.tensor([0, 1, 2, 0, 1, 2, -1, 0])
TEMPERATURE = 0.2


def a_step(excluded: Tensor | None = None) -> Step:
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 4, generator=generator), dim=-1) for n in (3, 3, 8))

    def mixes(similarity: Tensor) -> list[Synthetics]:
        pool = hardest(similarity, 5, some_excluded=excluded is not None)
        return [mix_pairs(queue, pool, 40, torch.Generator().manual_seed(1))]

    rule = Given(make=mixes)
    loss = contrastive_loss(query, key, queue, TEMPERATURE, rule, excluded)
    return Step(loss, query, key, queue, QUEUE_LABELS, excluded, rule, torch.Generator())


def of_own_class() -> Tensor:
    return (LABELS[:, None] == QUEUE_LABELS) & (LABELS >= 0)[:, None]


def matching_by_loops(step: Step, left_out: Tensor) -> list[float]:
    curves = []
    for query, key, out in zip(step.query, step.key, left_out.tolist(), strict=True):
        e = [math.exp(float(query @ n) / TEMPERATURE) for n in step.queue]
        e = [0.0 if excluded else each for each, excluded in zip(e, out, strict=True)]
        total = math.exp(float(query @ key) / TEMPERATURE) + sum(e)
        curves.append(sorted((each / total for each in e), reverse=True))
    return [sum(rank) / len(curves) for rank in zip(*curves, strict=True)]


def test_matching_probabilities_are_those_of_the_loss() -> None:
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    for step, left_out in ((a_step(), nothing), (a_step(of_own_class()), of_own_class())):
        found = matching_probabilities(step, TEMPERATURE)
        torch.testing.assert_close(found, torch.tensor(matching_by_loops(step, left_out)))


@pytest.fixture
def all_are_hardest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count all 8 negatives as the hardest."""
    monkeypatch.setattr(diagnosis, "num_hardest", lambda queue_size: queue_size)


def test_the_hardest_are_a_sixteenth_of_the_queue_as_in_the_paper() -> None:
    assert {size: num_hardest(size) for size in (8, 512, 4096, 16384, 65536)} == {
        8: 1, 512: 32, 4096: 256, 16384: 1024, 65536: 1024
    }  # fmt: skip


def test_false_negatives_are_counted_among_the_hardest_only() -> None:
    """Only the hardest of 8 negatives; query 2 has no label and is left out."""
    step = a_step()
    nearest = [
        max(range(8), key=lambda n, q=query: float(step.query[q] @ step.queue[n])) for query in (0, 1)
    ]
    same = [int(LABELS[query]) == int(QUEUE_LABELS[n]) for query, n in zip((0, 1), nearest, strict=True)]
    assert false_negatives(step, LABELS)["false_negatives"] == sum(same) / 2


@pytest.mark.usefixtures("all_are_hardest")
def test_false_negatives_and_parents_by_label() -> None:
    """Query 2 has no label and is left out."""
    found = false_negatives(a_step(), LABELS)
    same = of_own_class()
    assert found["false_negatives"] == (3 + 2) / 16
    (synthetic,) = a_step().rule.make(a_step().query @ a_step().queue.T)
    false = [
        [bool(same[query, parent]) for parent in pair]
        for query in (0, 1)
        for pair in synthetic.parents[query].tolist()
    ]
    assert 0 < found["false_parents_all"] < found["false_parents_any"] < 1
    assert math.isclose(found["false_parents_any"], sum(map(any, false)) / len(false), rel_tol=1e-6)
    assert math.isclose(found["false_parents_all"], sum(map(all, false)) / len(false), rel_tol=1e-6)


@pytest.mark.usefixtures("all_are_hardest")
def test_the_class_oracle_removes_false_parents_but_not_false_negatives() -> None:
    found = false_negatives(a_step(of_own_class()), LABELS)
    assert found == {"false_negatives": (3 + 2) / 16, "false_parents_any": 0, "false_parents_all": 0}


def test_parents_are_drawn_again_without_excluded_negatives() -> None:
    """Though the pool is the whole queue."""
    rule = MoCHi(num_hardest=8, num_pair_synthetics=40, num_query_synthetics=40)
    step = a_step(of_own_class())._replace(rule=rule, generator=torch.Generator().manual_seed(0))
    assert false_negatives(step, LABELS)["false_parents_any"] == 0
    assert false_negatives(step._replace(excluded=None), LABELS)["false_parents_any"] > 0


def test_without_labels_nothing_is_measured() -> None:
    assert false_negatives(a_step(), torch.full((3,), -1)) == {}


def test_the_hardest_1024_of_a_long_queue_are_measured() -> None:
    """Keys that turn away from the queries, so that row n is the n-th hardest: rows 0 to 1023 count."""
    angles = torch.linspace(0, 3, 16_500, dtype=torch.float64)
    queue = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(2, 2)
    labels = torch.zeros(len(queue), dtype=torch.long)
    labels[1023], labels[1024] = 1, 2
    step = a_step()._replace(query=query, key=query, queue=queue, queue_labels=labels)
    step = step._replace(rule=Given(make=lambda _: []))
    weights = (queue[:, 0] / TEMPERATURE).exp()
    expected = weights[:1024] / (math.exp(1 / TEMPERATURE) + weights.sum())
    torch.testing.assert_close(matching_probabilities(step, TEMPERATURE), expected)
    assert false_negatives(step, torch.tensor([1, -1])) == {"false_negatives": 1 / 1024}
    assert false_negatives(step, torch.tensor([2, -1])) == {"false_negatives": 0}


def test_parents_of_every_kind_of_synthetic_count_equally() -> None:
    """40 pairs and 15 query mixes of each query; a mix has one parent, so for it `any` and `all` agree."""
    step = a_step()
    pool = hardest(step.query @ step.queue.T, 5)
    pairs = mix_pairs(step.queue, pool, 40, torch.Generator().manual_seed(1))
    mixes = mix_with_query(step.query @ step.queue.T, pool, 15, torch.Generator().manual_seed(2))
    found = false_negatives(step._replace(rule=Given(make=lambda _: [pairs, mixes])), LABELS)
    same = of_own_class()
    false = [
        [bool(same[query, parent]) for parent in parents]
        for query in (0, 1)
        for kind in (pairs, mixes)
        for parents in kind.parents[query].tolist()
    ]
    assert len(false) == 2 * (40 + 15)
    assert math.isclose(found["false_parents_any"], sum(map(any, false)) / len(false), rel_tol=1e-6)
    assert math.isclose(found["false_parents_all"], sum(map(all, false)) / len(false), rel_tol=1e-6)


def test_a_queue_with_only_class_0_has_labels() -> None:
    step = a_step()._replace(queue_labels=torch.zeros(8, dtype=torch.long))
    assert false_negatives(step, LABELS)["false_negatives"] == 1 / 2


@dataclass(frozen=True, kw_only=True)
class Shown(Given):
    """A rule whose measurements are its inputs."""

    def measure(self, positive: Tensor, similarity: Tensor, temperature: float) -> dict[str, Tensor]:
        return {"positive": positive, "negatives": (similarity / temperature).exp().sum(1)}


def test_a_rule_measures_the_inputs_of_the_loss() -> None:
    for excluded in (None, of_own_class()):
        step = a_step(excluded)._replace(rule=Shown(make=lambda _: []))
        found = rule_measurements(step, TEMPERATURE)
        positive = sum(float(query @ key) for query, key in zip(step.query, step.key, strict=True)) / 3
        assert math.isclose(found["positive"], positive, rel_tol=1e-6)
        left_out = torch.zeros(3, 8, dtype=torch.bool) if excluded is None else excluded
        negatives = sum(
            math.exp(float(query @ n) / TEMPERATURE)
            for query, out in zip(step.query, left_out.tolist(), strict=True)
            for n, excluded_ in zip(step.queue, out, strict=True)
            if not excluded_
        )
        assert math.isclose(found["negatives"], negatives / 3, rel_tol=1e-6)


def test_measurements_of_hard_weighting_equal_loops() -> None:
    """Effective negatives (sum w)^2 / sum w^2 and the share at the minimum of g, in loops, without the
    excluded ones."""
    rule = HardWeighting(positive_prior=0.3, concentration=0.5)
    for excluded in (None, of_own_class()):
        step = a_step(excluded)._replace(rule=rule)
        effective, at_minimum = [], []
        for row, (query, key) in enumerate(zip(step.query, step.key, strict=True)):
            e = [
                math.exp(float(query @ n) / TEMPERATURE)
                for column, n in enumerate(step.queue)
                if excluded is None or not excluded[row, column]
            ]
            w = [each**0.5 for each in e]
            effective.append(sum(w) ** 2 / sum(each**2 for each in w))
            positive = math.exp(float(query @ key) / TEMPERATURE)
            estimate = (sum(e) - len(e) * 0.3 * positive) / 0.7
            at_minimum.append(estimate <= len(e) * math.exp(-1 / TEMPERATURE))
        found = rule_measurements(step, TEMPERATURE)
        assert found.keys() == {"debiased_at_minimum", "effective_negatives"}
        assert math.isclose(found["effective_negatives"], sum(effective) / 3, rel_tol=1e-5)
        assert math.isclose(found["debiased_at_minimum"], sum(at_minimum) / 3, rel_tol=1e-6)
