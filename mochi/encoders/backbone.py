"""The interface of an encoder."""

from torch import Tensor, nn

from mochi.config import Encoder


class Backbone(nn.Module):
    """Images to features. Losses and probes need only this; a detector needs the stages of a `ResNet`."""

    config: Encoder
    """The architecture, from which it can be built again."""
    num_features: int
    """D."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        raise NotImplementedError
