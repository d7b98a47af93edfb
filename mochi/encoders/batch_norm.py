"""Batch normalisation in groups of the batch, which MoCo's shuffling needs on a single device."""

from typing import Any

import torch
from torch import Tensor, nn

from mochi.runtime.cuda_graphs import parallel_branches


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are separate for each of `num_groups` groups.

    Consecutive images form a group, as if each group were on a separate GPU. Running statistics are the
    mean over the groups.

    Source: SplitBatchNorm of the MoCo Colab demo (facebookresearch/moco, branch colab-notebook).
    Deviation: groups are consecutive images, not every G-th image; if G does not divide the batch,
    group sizes differ by one.
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
        means = self.running_mean.expand(self.num_groups, -1).contiguous()  # (G, C)
        variances = self.running_var.expand(self.num_groups, -1).contiguous()  # (G, C)
        output: Tensor = _Grouped.apply(
            input, self.weight, self.bias, means, variances, self.momentum or 0.1, self.eps
        )
        torch.mean(means, 0, out=self.running_mean)
        torch.mean(variances, 0, out=self.running_var)
        self.num_batches_tracked.add_(1)
        return output


class _Grouped(torch.autograd.Function):
    """Write each group into its part of one output, without a final concatenation.

    On a CPU it is bit-equal to `F.batch_norm` on each group. On CUDA it is torch's native kernel where
    `F.batch_norm` may use cuDNN's, which differs in the last bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        means: Tensor,
        variances: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); updates running `means` and `variances` (G, C)."""
        output = torch.empty_like(input)
        ctx.sizes, ctx.eps = group_sizes(len(input), len(means)), eps
        save_means, save_invstds = ([torch.empty_like(weight) for _ in ctx.sizes] for _ in range(2))
        inputs, outputs = (each.split_with_sizes(ctx.sizes) for each in (input, output))
        groups = zip(
            inputs, outputs, means.unbind(), variances.unbind(), save_means, save_invstds, strict=True
        )
        with parallel_branches(input.device, len(ctx.sizes)) as branch:
            for index, (group, part, mean, variance, save_mean, save_invstd) in enumerate(groups):
                with branch(index):
                    torch.native_batch_norm(
                        group, weight, bias, mean, variance, True, momentum, eps,
                        out=(part, save_mean, save_invstd),
                    )  # fmt: skip
        ctx.save_for_backward(input, weight, *save_means, *save_invstds)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """For input, weight and bias, where required."""
        images, weight, *saved = ctx.saved_tensors
        means, invstds = saved[: len(ctx.sizes)], saved[len(ctx.sizes) :]
        wanted = ctx.needs_input_grad[:3]
        grad_input = torch.empty_like(images)
        grad_weight, grad_bias = [], []
        parts = (each.split_with_sizes(ctx.sizes) for each in (grad_input, grads[0], images))
        groups = zip(*parts, means, invstds, strict=True)
        with parallel_branches(images.device, len(ctx.sizes)) as branch:
            for index, (part, grad, group, mean, invstd) in enumerate(groups):
                with branch(index):
                    grads_of_group = torch.ops.aten.native_batch_norm_backward(
                        grad, group, weight, None, None, mean, invstd, True, ctx.eps, wanted
                    )
                    if wanted[0]:
                        part.copy_(grads_of_group[0])
                    grad_weight.append(grads_of_group[1])
                    grad_bias.append(grads_of_group[2])
        # Last group first: the order in which autograd would sum.
        return (
            grad_input if wanted[0] else None,
            sum(reversed(grad_weight[:-1]), grad_weight[-1]) if wanted[1] else None,
            sum(reversed(grad_bias[:-1]), grad_bias[-1]) if wanted[2] else None,
            *[None] * 4,
        )


def group_sizes(batch_size: int, num_groups: int) -> list[int]:
    """Sizes of the groups: as equal as possible, the larger ones first."""
    size, remainder = divmod(batch_size, num_groups)
    return [size + 1] * remainder + [size] * (num_groups - remainder)
