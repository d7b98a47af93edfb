"""ResNets with torchvision's blocks, names and parameter names."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from mochi.config import Encoder
from mochi.encoders.backbone import Backbone


class Layout(NamedTuple):
    """The layout of a ResNet."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    """Blocks in each of the four stages."""
    groups: int = 1
    """Groups of the 3x3 convolutions (ResNeXt)."""
    base_width: int = 64
    """Channels of a group where the stage has 64 (torchvision's `width_per_group`)."""


LAYOUTS = {
    "resnet10": Layout(BasicBlock, (1, 1, 1, 1)),
    "resnet18": Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Layout(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Layout(Bottleneck, (3, 4, 23, 3)),
    "resnext50_32x4d": Layout(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "wide_resnet50_2": Layout(Bottleneck, (3, 4, 6, 3), base_width=128),
}
"""Architecture -> layout; the names of `mochi.config.Encoder`."""

STRIDES = {"imagenet": 16, "half": 8, "full": 4}
"""Stem -> stride in pixels of layer3's features (res4), which a detector uses."""

_SAFE_CHANNELS = 16


class Shortcut(nn.Conv2d):
    """The 1x1 convolution of a block's shortcut, without bias.

    Below 16 channels it first drops the rows and columns that the stride skips: there the gradient of a
    strided 1x1 convolution in channels-last float32 writes out of bounds (torch 2.14, oneDNN, CPU).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.in_channels >= _SAFE_CHANNELS:
            return super().forward(input)
        down, across = self.stride
        return F.conv2d(input[:, :, ::down, ::across], self.weight)


class ResNet(Backbone):
    """torchvision's ResNet with a choice of stem and width; parameters have torchvision's names.

    `forward` gives pooled features (B, D); there is no `fc`. With the `imagenet` stem and width 64 it
    computes exactly what torchvision's does before `fc` (a test compares them). A detector takes its
    stages: conv1, bn1, relu, maxpool and layer1 to layer3 process the image, layer4 each region.
    """

    def __init__(self, config: Encoder, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        assert config.stem is not None
        assert config.width is not None
        self.config, self._layout, self._norm_layer = config, LAYOUTS[config.architecture], norm_layer
        width = config.width
        kernel, stride = {"imagenet": (7, 2), "half": (3, 2), "full": (3, 1)}[config.stem]
        self.stride = STRIDES[config.stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if config.stem == "imagenet" else nn.Identity()
        self._channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(width * 2**stage, depth, stride=2 if stage else 1)
            for stage, depth in enumerate(self._layout.depths)
        )
        self.num_features = self._channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, planes: int, depth: int, stride: int) -> nn.Sequential:
        """One stage of `depth` blocks of `planes` channels, times the block's expansion at its end."""
        block, _, groups, base_width = self._layout
        channels = planes * block.expansion
        downsample = None
        if stride != 1 or self._channels != channels:
            downsample = nn.Sequential(
                Shortcut(self._channels, channels, stride), self._norm_layer(channels)
            )
        kind = {"groups": groups, "base_width": base_width, "norm_layer": self._norm_layer}
        blocks = [block(self._channels, planes, stride, downsample, **kind)]
        blocks += [block(channels, planes, **kind) for _ in range(depth - 1)]
        self._channels = channels
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), D = 8 * width * expansion."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))
