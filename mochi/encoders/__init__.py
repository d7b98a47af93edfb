"""Encoders: architectures, projection heads, and files. Only `build` constructs one."""

from collections.abc import Callable

import torch
from torch import nn

from mochi.config import Encoder
from mochi.encoders.resnet import ResNet


def build(
    config: Encoder, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d, seed: int | None = None
) -> ResNet:
    """A randomly initialised encoder in training mode, on the CPU.

    Args:
        config: its architecture.
        norm_layer: number of channels -> normalisation layer.
        seed: of the weights, which leaves torch's generator as it was; None: draw from torch's generator.
    """
    if seed is None:
        return ResNet(config, norm_layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(config, norm_layer)


def build_untrained(config: Encoder, seed: int) -> ResNet:
    """The random-init baseline."""
    return build(config, seed=seed)
