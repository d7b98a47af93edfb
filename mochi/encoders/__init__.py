"""Encoders: architectures, projection heads, and files. Only `build` constructs one."""

from collections.abc import Callable

import torch
from torch import nn

from mochi.config import Encoder
from mochi.encoders.backbone import Backbone
from mochi.encoders.resnet import ResNet
from mochi.encoders.timm_encoder import TimmEncoder


def build(
    config: Encoder, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d, seed: int | None = None
) -> Backbone:
    """A randomly initialised encoder in training mode, on the CPU.

    Args:
        config: its architecture.
        norm_layer: number of channels -> normalisation layer.
        seed: of the weights, without changing torch's generator; None: use torch's generator.

    Raises:
        ConfigError: timm has no model of that name.
    """
    family = ResNet if config.is_resnet else TimmEncoder
    if seed is None:
        return family(config, norm_layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family(config, norm_layer)


def build_untrained(config: Encoder, seed: int) -> Backbone:
    """The random-init baseline."""
    return build(config, seed=seed)
