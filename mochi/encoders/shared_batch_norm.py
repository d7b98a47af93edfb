"""Batch normalisation over the images of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi.runtime import distributed


class SharedBatchNorm2d(nn.SyncBatchNorm, nn.BatchNorm2d):
    """Batch normalisation whose training statistics are those of all processes' images.

    With one process it is torch's BatchNorm2d, on GPUs torch's SyncBatchNorm. Several CPU processes use
    the implementation here. Processes may have different numbers of elements; every element has equal
    weight.

    Source: detectron2 layers/batch_norm.py NaiveSyncBatchNorm, which MoCo's C4 configurations name.
    Deviation: statistics are weighted by the number of elements (its stats_mode "N").
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or distributed.world_size() == 1:
            return nn.BatchNorm2d.forward(self, input)
        if input.is_cuda:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values = input.float()
        count = values.new_full((1,), values.numel() / self.num_features)
        sums = _SumOverRanks.apply(torch.cat((values.sum((0, 2, 3)), count)))  # (C + 1,)
        total = sums[-1]
        mean = sums[:-1] / total
        # Not the mean square minus the squared mean, which loses precision if the mean is large.
        centred = values - mean[:, None, None]
        variance = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            momentum = self.momentum or 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * total / (total - 1), momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        result: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return result.to(input.dtype)


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
