"""Batch normalisation in groups of the batch, which MoCo's shuffling needs on a single device."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are separate for each of `num_groups` groups.

    Consecutive images form a group, as if each group were on a separate GPU. Running statistics are the
    mean over the groups.

    Source: SplitBatchNorm of the MoCo Colab demo (facebookresearch/moco, branch colab-notebook).
    Deviation: groups are runs of consecutive images, not every G-th image; a batch that G does not
    divide gives groups whose sizes differ by one.
    """

    def __init__(self, num_features: int, num_groups: int) -> None:
        super().__init__(num_features)
        self.num_groups = num_groups

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or self.num_groups == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # Not `tensor_split`: in its backward pass each group writes zeros for the whole batch.
        groups = input.split(group_sizes(len(input), self.num_groups))
        means = self.running_mean.repeat(self.num_groups, 1)  # (G, C)
        variances = self.running_var.repeat(self.num_groups, 1)  # (G, C)
        outputs = [
            F.batch_norm(group, mean, var, self.weight, self.bias, True, self.momentum or 0.1, self.eps)
            for group, mean, var in zip(groups, means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


def group_sizes(batch_size: int, num_groups: int) -> list[int]:
    """Sizes of the groups: as equal as possible, the larger ones first."""
    size, remainder = divmod(batch_size, num_groups)
    return [size + 1] * remainder + [size] * (num_groups - remainder)
