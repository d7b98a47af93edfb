"""What an encoder is to the rest of the project."""

from torch import Tensor, nn

from mochi.config import Encoder


class Backbone(nn.Module):
    """Images to features. Losses and probes ask for no more; a detector needs the stages of a `ResNet`."""

    config: Encoder
    """What was asked for: enough to build it again."""
    num_features: int
    """D."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        raise NotImplementedError
