"""Momentum contrast (He et al. 2020; Chen et al. 2020) with hard negative mixing (Kalantidis et al. 2020).

`MoCo.training_step` is the algorithm, in the papers' order and words.
"""

import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mochi import encoders
from mochi.config import ConfigError, Contrastive, Encoder
from mochi.contrast.key_queue import KeyQueue
from mochi.contrast.loss import Contrast, contrastive_loss
from mochi.contrast.rules import Rule, exclude
from mochi.contrast.rules.moco import MoCo as MoCoRule
from mochi.encoders.backbone import Backbone
from mochi.encoders.batch_norm import GroupedBatchNorm2d
from mochi.encoders.heads import projection_head
from mochi.runtime.distributed import exchange, gather, rank, world_size
from mochi.runtime.seeding import generator


class Step(NamedTuple):
    """What a training step computed."""

    loss: Contrast
    query: Tensor  # (B, C) unit queries, float32
    key: Tensor  # (B, C) unit keys, float32
    queue: Tensor  # (K, C) the negatives the loss saw
    queue_labels: Tensor  # (K,) their classes
    excluded: Tensor | None  # (B, K) bool, which of them the masks excluded
    rule: Rule  # how each negative counted
    generator: torch.Generator  # of the rule's random numbers; used again, it gives new ones


class MoCo(nn.Module):
    """Query encoder, momentum encoder and queue.

    Args:
        encoder: the backbone's architecture.
        recipe: the method's hyper-parameters.
        seed: of the weights, the initial queue, the shuffles and the mixes.

    Raises:
        ConfigError: the processes cannot share the batch-norm groups evenly.
    """

    def __init__(self, encoder: Encoder, recipe: Contrastive, seed: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.rule, self.masks = recipe.negatives.make(), recipe.make_masks()
        self.seed = seed
        num_groups = _groups_of_a_rank(recipe.bn_groups)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = encoders.build(encoder, partial(GroupedBatchNorm2d, num_groups=num_groups))
            head = projection_head(backbone.num_features, recipe.embedding_dim, recipe.head)
            self.query_encoder = nn.Sequential()
            self.query_encoder.add_module("backbone", backbone)
            self.query_encoder.add_module("head", head)
            self.queue = KeyQueue(recipe.queue_size, recipe.embedding_dim)
        self.momentum_encoder = copy.deepcopy(self.query_encoder).requires_grad_(requires_grad=False)

    @property
    def backbone(self) -> Backbone:
        """The encoder that the other stages use."""
        backbone = self.query_encoder.get_submodule("backbone")
        assert isinstance(backbone, Backbone)
        return backbone

    def training_step(
        self,
        query_images: Tensor,
        key_images: Tensor,
        labels: Tensor,
        step: int,
        *,
        synthesize: bool,
        images: Tensor | None = None,
    ) -> Step:
        """Run one step of MoCo with the recipe's rule of negatives, up to the loss.

        The queue is not changed: call `enqueue` after all losses of the step, so that no key is a negative
        of its own query.

        Args:
            query_images: (B, 3, H, W) first views of this rank's images.
            key_images: (B, 3, H, W) second views.
            labels: (B,) classes, -1 where unknown; only masks use them.
            step: the global step, from 0.
            synthesize: True: use the recipe's rule. False: its warm-up, with MoCo's loss.
            images: (B,) indices of the images, -1 where unknown; only masks use them. None: all unknown.
        """
        query = unit(self.query_encoder(query_images))  # (B, C)
        with torch.no_grad():
            self._update_momentum_encoder()
            key = self._encode_keys(key_images, step)  # (B, C)
        rule = self.rule if synthesize else MoCoRule()
        images = torch.full_like(labels, -1) if images is None else images
        excluded = exclude(self.masks, labels, images, self.queue)  # (B, K)
        # The rank is part of the key: each rank mixes for its own queries.
        rng = generator("mix negatives", self.seed, step, rank(), device=self.queue.keys.device)
        loss = contrastive_loss(query, key, self.queue.keys, self.recipe.temperature, rule, excluded, rng)
        return Step(loss, query.detach(), key, self.queue.keys, self.queue.labels, excluded, rule, rng)

    def enqueue(self, key: Tensor, labels: Tensor, images: Tensor | None = None) -> None:
        """Replace the oldest keys, gathered in rank order: the same queue on every rank."""
        images = torch.full_like(labels, -1) if images is None else images
        self.queue.enqueue(gather(key), *gather(torch.stack((labels, images), 1)).unbind(1))

    def _update_momentum_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters only, not batch-norm statistics."""
        torch._foreach_lerp_(
            list(self.momentum_encoder.parameters()),
            list(self.query_encoder.parameters()),
            1 - self.recipe.key_momentum,
        )

    def _encode_keys(self, images: Tensor, step: int) -> Tensor:
        """Keys of this rank's images, each normalised in a batch-norm group of a shuffled batch.

        Otherwise the statistics that a query and its positive share would leak information about the
        positive (MoCo section 3.3). On one device the groups replace MoCo's GPUs: without groups, a
        permutation would not change the statistics.
        """
        shuffle = generator("shuffle keys", self.seed, step)  # the same on every rank
        order = torch.randperm(world_size() * len(images), generator=shuffle)
        rows = images.permute(0, 2, 3, 1)  # channels last, as in memory
        shuffled = unit(self.momentum_encoder(exchange(rows, order).permute(0, 3, 1, 2)))
        return exchange(shuffled, order.argsort())


def _groups_of_a_rank(bn_groups: int) -> int:
    """This rank's number of batch-norm groups; `bn_groups` counts those of the global batch."""
    if bn_groups % world_size():
        fits = ", ".join(str(n) for n in range(1, bn_groups + 1) if bn_groups % n == 0)
        raise ConfigError(
            f"bn_groups: found {bn_groups}; {world_size()} processes cannot share the groups evenly; "
            f"use a number of processes (--gpus) out of {fits}"
        )
    return bn_groups // world_size()


def unit(features: Tensor) -> Tensor:
    """(B, C) -> (B, C) of length 1, in float32, whatever the encoder's precision."""
    return F.normalize(features.float(), dim=-1)
