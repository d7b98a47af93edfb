"""ResNets with torchvision's blocks and parameter names."""

from collections.abc import Callable

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


class Shortcut(nn.Conv2d):
    """The 1x1 convolution of a block's shortcut, without bias.

    Below 16 channels it first drops the rows and columns that the stride skips: there the gradient of a
    strided 1x1 convolution in channels-last float32 writes outside its memory (torch 2.14, oneDNN, CPU).
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
