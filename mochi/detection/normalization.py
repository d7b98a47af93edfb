"""Running statistics of batch normalisation, exact before an evaluation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mochi.runtime import distributed


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any], run: Any) -> int:
    """Replace running statistics by their mean over `batches` of training data ("precise BN").

    Args:
        model: layers in training mode are recomputed; frozen ones (in evaluation mode) are unchanged.
        batches: arguments of `run`.
        run: runs the model forward on one batch, in training mode; its result is ignored.

    Returns:
        The number of batches.

    Source: fvcore nn/precise_bn.py as of 2020, which the paper's detectron2 called (PRECISE_BN). Since
    d3b3b12 (2021-05-17) fvcore takes the variance over the images of all batches together and weights
    batches by their size, which gives slightly larger variances.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.training and layer.track_running_stats
    ]
    momenta = [layer.momentum for layer in layers]
    sums = [torch.zeros_like(_statistics(layer)) for layer in layers]
    number = 0
    for layer in layers:
        # The running statistics become those of only the last batch.
        layer.momentum = 1.0
    for batch in batches:
        run(batch)
        number += 1
        for layer, total in zip(layers, sums, strict=True):
            total.add_(_statistics(layer))
    for layer, momentum, total in zip(layers, momenta, sums, strict=True):
        layer.momentum = momentum
        if number:
            layer.running_mean, layer.running_var = distributed.mean_over_ranks(total / number)
    return number


def _statistics(layer: nn.BatchNorm2d) -> Tensor:
    """(2, C) running mean and variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack([layer.running_mean, layer.running_var])
