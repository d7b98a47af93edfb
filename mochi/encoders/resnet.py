"""Encoders: ResNets with torchvision's blocks and names, projection heads, grouped batch normalisation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from mochi.config import Encoder

# Architecture -> (block, blocks in each of the four stages).
_LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}

_SAFE_CHANNELS = 16


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are separate for each of `num_groups` groups.

    Consecutive images form a group, as if each group stood on a GPU of its own, which is what MoCo's
    shuffling needs. Running statistics are the mean over the groups.

    Source: SplitBatchNorm of the MoCo Colab demo (facebookresearch/moco, branch colab-notebook).
    Deviation: groups are runs of consecutive images, not every G-th image; a batch that G does not
    divide gives groups whose sizes differ by the remainder.
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
        groups = input.tensor_split(self.num_groups)
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


class Shortcut(nn.Conv2d):
    """The 1x1 convolution beside a block, without bias.

    Below 16 channels the rows and columns it skips are cut away first: the gradient of a strided 1x1
    convolution in channels-last float32 writes outside its memory there (torch 2.14 with oneDNN on a CPU).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.in_channels >= _SAFE_CHANNELS:
            return super().forward(input)
        down, across = self.stride
        return F.conv2d(input[:, :, ::down, ::across], self.weight)


class ResNet(nn.Module):
    """torchvision's ResNet with a choice of stem and width; parameters carry torchvision's names.

    `forward` gives pooled features (B, D); there is no `fc`. With the `imagenet` stem and width 64 it
    computes exactly what torchvision's does before `fc` (a test holds it to that).
    """

    def __init__(self, config: Encoder, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        block, depths = _LAYOUTS[config.architecture]
        width = config.width
        self._norm_layer = norm_layer
        kernel, stride = {"imagenet": (7, 2), "half": (3, 2), "full": (3, 1)}[config.stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if config.stem == "imagenet" else nn.Identity()
        self._channels = width
        self.layer1 = self._stage(block, width, depths[0], stride=1)
        self.layer2 = self._stage(block, 2 * width, depths[1], stride=2)
        self.layer3 = self._stage(block, 4 * width, depths[2], stride=2)
        self.layer4 = self._stage(block, 8 * width, depths[3], stride=2)
        self.num_features = self._channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, depth: int, stride: int
    ) -> nn.Sequential:
        """One stage of `depth` blocks; Bottleneck blocks keep 64 as their base width."""
        channels = planes * block.expansion
        downsample = None
        if stride != 1 or self._channels != channels:
            downsample = nn.Sequential(
                Shortcut(self._channels, channels, stride), self._norm_layer(channels)
            )
        blocks = [block(self._channels, planes, stride, downsample, norm_layer=self._norm_layer)]
        blocks += [block(channels, planes, norm_layer=self._norm_layer) for _ in range(depth - 1)]
        self._channels = channels
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), D = 8 * width * expansion."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def projection_head(num_features: int, embedding_dim: int, kind: str) -> nn.Sequential:
    """MoCo's head: `linear` (version 1) or `mlp` (version 2: Linear, ReLU, Linear; no batch norm).

    Source: facebookresearch/moco moco/builder.py.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(num_features, embedding_dim))
    return nn.Sequential(
        nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, embedding_dim)
    )
