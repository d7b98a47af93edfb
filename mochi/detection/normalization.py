"""Batch normalisation of a detector: shared by all processes in training, exact before evaluation."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi.runtime import distributed


class _SumOverRanks(torch.autograd.Function):
    """Each process's value becomes the sum of all, and so does each process's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes, on any device.

    With one process it is torch's own. Processes may hold different numbers of elements; each counts.

    Source: detectron2 layers/batch_norm.py NaiveSyncBatchNorm, which MoCo's C4 configurations name.
    Deviation: statistics are weighted by the number of elements (its stats_mode "N").
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        channels = self.num_features
        values = input.float()
        count = values.new_full((1,), values.numel() / channels)
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count])  # (2C + 1,)
        sums = _SumOverRanks.apply(sums)
        total = sums[-1]
        mean = sums[:channels] / total
        variance = sums[channels : 2 * channels] / total - mean.square()
        with torch.no_grad():
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * total / (total - 1), momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        result: Tensor = values * scale[:, None, None] + shift[:, None, None]
        return result.to(input.dtype)


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any], run: Any) -> int:
    """Replace running statistics by their mean over `batches` of training data ("precise BN").

    Args:
        model: layers in training mode are recomputed; frozen ones (in evaluation mode) stay as they are.
        batches: what `run` takes.
        run: runs the model forward on one batch, in training mode; its result is dropped.

    Returns:
        The number of batches.

    Source: fvcore nn/precise_bn.py, as detectron2's PRECISE_BN uses it.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.training and layer.track_running_stats
    ]
    momenta = [layer.momentum for layer in layers]
    sums = [torch.zeros_like(_statistics(layer)) for layer in layers]
    number = 0
    for layer in layers:
        # The running statistics become those of the last batch alone.
        layer.momentum = 1.0
    for batch in batches:
        run(batch)
        number += 1
        for layer, total in zip(layers, sums, strict=True):
            total.add_(_statistics(layer))
    for layer, momentum, total in zip(layers, momenta, sums, strict=True):
        layer.momentum = momentum
        if number:
            layer.running_mean, layer.running_var = distributed.mean_over_ranks(total / number)
    return number


def _statistics(layer: nn.BatchNorm2d) -> Tensor:
    """(2, C) running mean and variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack([layer.running_mean, layer.running_var])
