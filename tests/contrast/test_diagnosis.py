"""The measurements of figures 2 and 3 against loops over queries and negatives, with and without oracle."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast import diagnosis
from mochi.contrast.diagnosis import false_negatives, matching_probabilities, num_hardest
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.moco import Step
from mochi.contrast.negatives import Synthetics, hardest, mix_pairs
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
    return [sum(place) / len(curves) for place in zip(*curves, strict=True)]


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


def test_without_labels_nothing_is_measured() -> None:
    assert false_negatives(a_step(), torch.full((3,), -1)) == {}
