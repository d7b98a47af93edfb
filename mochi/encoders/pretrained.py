"""Encoders that pretraining wrote, for code outside this project: `from mochi import load_encoder`."""

from pathlib import Path

import torch

from mochi.config import Encoder
from mochi.config.reading import validate
from mochi.encoders import files
from mochi.encoders.resnet import ResNet


def load_encoder(
    path: Path | str, *, architecture: str, stem: str, width: int, device: torch.device | str = "cpu"
) -> ResNet:
    """A pretrained backbone, frozen, in evaluation mode and channels-last.

    An encoder file holds tensors alone, so the caller names the architecture: the `encoder` section of the
    experiment that trained it. A file of another architecture is refused.

    Args:
        path: encoder.safetensors.
        architecture: resnet10, resnet18 or resnet50.
        stem: imagenet, half or full; `mochi.config.Encoder` explains them.
        width: channels of the first stage, 64 in torchvision's ResNets.
        device: where the encoder goes.

    Returns:
        (B, 3, H, W) normalised images -> (B, num_features) features.

    Raises:
        EncoderError: the file cannot be read or does not fit (a ValueError).
        ConfigError: there is no such architecture, stem or width (a ValueError).
    """
    settings = {"architecture": architecture, "stem": stem, "width": width}
    config = validate(Encoder, settings, "load_encoder")
    return files.load_encoder(Path(path), config, torch.device(device))
