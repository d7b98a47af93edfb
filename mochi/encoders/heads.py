"""Projection heads: map an encoder's features to the space of the loss. Dropped after pretraining."""

from torch import nn


def projection_head(num_features: int, embedding_dim: int, kind: str) -> nn.Sequential:
    """MoCo's head: `linear` (version 1) or `mlp` (version 2: Linear, ReLU, Linear; no batch norm).

    Source: facebookresearch/moco moco/builder.py.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(num_features, embedding_dim))
    return nn.Sequential(
        nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, embedding_dim)
    )
