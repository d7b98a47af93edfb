"""Alignment and uniformity compared with their definitions, pair by pair, and with closed forms."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.analysis.geometry import alignment, uniformity


def on_the_sphere(num: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def distances(features: Tensor, labels: list[int] | None = None) -> list[float]:
    """Squared distances of all pairs, or of all pairs of a class."""
    rows = features.double().tolist()
    return [
        sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
        for i, j in itertools.combinations(range(len(rows)), 2)
        if labels is None or labels[i] == labels[j] >= 0
    ]


def test_alignment_and_uniformity_equal_their_definitions() -> None:
    features = on_the_sphere(50, 8)
    labels = [index % 4 - 1 for index in range(50)]  # a quarter without a label
    pairs = distances(features, labels)
    assert alignment(features, torch.tensor(labels)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    every = distances(features)
    expected = math.log(sum(math.exp(-2 * distance) for distance in every) / len(every))
    assert uniformity(features) == pytest.approx(expected, abs=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = on_the_sphere(50, 8)
    whole = uniformity(features)
    monkeypatch.setattr("mochi.analysis.geometry._CHUNK", 7)
    assert uniformity(features) == pytest.approx(whole, abs=1e-6)


def test_closed_forms() -> None:
    same = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    assert alignment(same, torch.zeros(6).long()) == 0
    assert uniformity(same) == pytest.approx(0, abs=1e-12)
    # Two points opposite each other: the squared distance is 4.
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert alignment(opposite, torch.zeros(2).long()) == 4
    assert uniformity(opposite) == pytest.approx(-8)
    # Corners of a simplex in C dimensions: all squared distances are 2.
    corners = torch.eye(5)
    assert alignment(corners, torch.zeros(5).long()) == pytest.approx(2)
    assert uniformity(corners) == pytest.approx(-4)


def test_uniformity_of_points_on_a_circle() -> None:
    """Over the circle, exp(4 cos a - 4) has mean exp(-4) I0(4); pairs of a point with itself do not
    count.
    """
    num = 500
    angles = torch.arange(num, dtype=torch.float64) * 2 * math.pi / num
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    mean = math.exp(-4) * torch.special.i0(torch.tensor(4.0, dtype=torch.float64)).item()
    assert uniformity(circle) == pytest.approx(math.log((num * mean - 1) / (num - 1)), abs=1e-6)


def test_too_few_images_have_neither() -> None:
    one = torch.tensor([[1.0, 0.0]])
    assert uniformity(one) is None
    assert alignment(one, torch.zeros(1).long()) is None
    two = torch.eye(2)
    assert alignment(two, torch.tensor([0, 1])) is None, "no two of a class"
    assert alignment(two, torch.tensor([-1, -1])) is None, "no labels"
