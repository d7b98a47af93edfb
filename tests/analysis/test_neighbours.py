"""Nearest images compared with sorting, and positions on a map."""

import numpy as np
import torch
from torch.nn import functional as F

from mochi.analysis.embedding_map import project_2d
from mochi.analysis.neighbours import evenly_spaced, nearest


def test_nearest_images_equal_those_of_a_sort() -> None:
    features = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    rows, values = nearest(features, torch.tensor([3, 29]), 4)
    for query, found, cosines in zip([3, 29], rows.tolist(), values.tolist(), strict=True):
        order = sorted(
            (row for row in range(30) if row != query),
            key=lambda row: -(features[row] @ features[query]).item(),
        )
        assert found == order[:4]
        torch.testing.assert_close(torch.tensor(cosines), features[found] @ features[query])


def test_few_images_have_few_neighbours() -> None:
    rows, _ = nearest(torch.eye(3), torch.tensor([0]), 6)
    assert sorted(rows[0].tolist()) == [1, 2]
    rows, _ = nearest(torch.eye(1), torch.tensor([0]), 6)
    assert rows.shape == (1, 0)


def test_evenly_spaced_positions_include_both_ends() -> None:
    assert evenly_spaced(100, 3).tolist() == [0, 50, 99]
    assert evenly_spaced(2, 8).tolist() == [0, 1]
    assert evenly_spaced(1, 8).tolist() == [0]


def test_two_clusters_are_apart_on_the_map() -> None:
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.eye(2, 16), 20, axis=0)
    features = (clusters + 0.05 * draw.standard_normal((40, 16))).astype(np.float32)
    points, method = project_2d(features)
    assert method == "t-SNE, perplexity 13"
    assert points.shape == (40, 2)
    assert (points.min(), points.max()) == (0, 1)
    first, second = points[:20], points[20:]
    between = np.linalg.norm(first.mean(0) - second.mean(0))
    assert between > 2 * max(np.linalg.norm(part - part.mean(0), axis=1).max() for part in (first, second))
    assert np.array_equal(project_2d(features)[0], points)


def test_few_or_equal_images_have_positions() -> None:
    for features, method in (
        (np.eye(5, 8), "PCA"),
        (np.eye(2, 8), "in a row"),
        (np.ones((12, 8)), "in a row"),
    ):
        points, found = project_2d(features.astype(np.float32))
        assert found == method
        assert points.min() >= 0
        assert points.max() <= 1
