"""Precise batch-norm statistics compared with their definition."""

import torch
from torch import nn

from mochi.detection.normalization import recompute_statistics


def test_precise_statistics_are_means_over_batches() -> None:
    batches = [torch.randn(4, 3, 5, 5) * scale for scale in (1, 2, 5)]
    layer, frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
    model = nn.Sequential(layer, frozen)
    assert recompute_statistics(model, batches, model) == 3
    variances = [batch.transpose(0, 1).flatten(1).var(dim=1) for batch in batches]
    means = [batch.mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0))
    assert layer.momentum == 0.1
    assert torch.equal(frozen.running_mean, torch.zeros(3))
    # No batches: nothing changes.
    before = layer.running_var.clone()
    assert recompute_statistics(model, [], model) == 0
    assert torch.equal(layer.running_var, before)
