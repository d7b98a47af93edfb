r"""The contrastive loss over real and synthetic negatives, with its gradient, as one function.

    L = -log( e^{q.k/tau} / (e^{q.k/tau} + sum_n e^{q.n/tau} + sum_h e^{q.h/tau}) )      (MoCHi eq. 1)

A synthetic h is a weighted sum of its parents (see `negatives`), so with p the softmax over all columns

    dL/dq = ( (p_k - 1) k + sum_n p_n n + sum_h p_h (v_q q + sum_p v_p n_p) ) / tau.

Adding each p_h v_p to the probability of its parent's column leaves one product of the (B, K)
probabilities with the queue. The forward pass makes this gradient while the probabilities are at hand: no
synthetic vector, no second (B, K) buffer, no scatter in a backward pass. Mixing costs less than MoCo's
loss written with autograd.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mochi.contrast.negatives import Rule, Synthetics

# Queries that a processor takes at once. Fewer would read the queue too often, more would fill memory.
_QUERY_CHUNK = 64


class ContrastiveLoss(NamedTuple):
    """A loss and what is worth knowing about it."""

    loss: Tensor  # () mean over queries, nats
    positive: Tensor  # (B,) q.k
    hardest_negative: Tensor  # (B,) largest q.n
    hardest_synthetic: Tensor  # (B,) largest q.h, -inf without synthetics


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    rule: Rule | None = None,
    excluded: Tensor | None = None,
) -> ContrastiveLoss:
    """InfoNCE against the queue and the synthetic negatives of `rule`.

    Computed in float32 even under autocast (float64 for float64 inputs). Only `query` gets a gradient.

    Args:
        query: (B, C) unit queries.
        key: (B, C) unit keys, their positives.
        queue: (K, C) unit keys, the negatives.
        temperature: tau, > 0; divides synthetic logits too.
        rule: makes the synthetic negatives, called with a few queries at a time; None: plain MoCo.
        excluded: (B, K) bool, negatives to leave out of the loss and of every mix (class oracle).

    Source: Kalantidis et al. 2020, eq. 1 and section 3; He et al. 2020, eq. 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        tensors = (query.to(dtype), key.detach().to(dtype), queue.to(dtype))
        return ContrastiveLoss(*_Contrast.apply(*tensors, temperature, rule, excluded))


class _Contrast(torch.autograd.Function):
    """Forward gives the loss and stores its gradient, (B, C); backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        queue: Tensor,
        temperature: float,
        rule: Rule | None,
        excluded: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A GPU takes all queries at once; a processor a few, in a buffer that stays warm."""
        size = len(query) if query.device.type != "cpu" else min(_QUERY_CHUNK, len(query))
        buffer = query.new_empty(size, len(queue))
        parts = []
        for start in range(0, len(query), size):
            rows = slice(start, start + size)
            p = torch.mm(query[rows], queue.T, out=buffer[: len(query[rows])])
            if excluded is not None:
                p.masked_fill_(excluded[rows], -torch.inf)
            parts.append(_contrast_rows(query[rows], key[rows], queue, temperature, rule, p))
        loss, positive, hardest_negative, hardest_synthetic, gradient = map(
            torch.cat, zip(*parts, strict=True)
        )
        ctx.save_for_backward(gradient.div_(temperature * len(query)))
        ctx.mark_non_differentiable(positive, hardest_negative, hardest_synthetic)
        return loss.mean(), positive, hardest_negative, hardest_synthetic

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """(B, C) for the query; key, queue and synthetics are constants."""
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None, None, None


def _contrast_rows(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, rule: Rule | None, p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each query, its similarities, and its gradient times tau.

    `p` (B, K) holds the similarities to the queue first and the probabilities in the end.
    """
    positive = (query * key).sum(-1)  # (B,)
    synthetics = rule(p) if rule is not None else []
    mixed = [synthetic.similarity(p) for synthetic in synthetics]  # (B, S) each

    hardest_negative = p.amax(1)
    hardest_synthetic = torch.full_like(positive, -torch.inf)
    for similarity in mixed:
        hardest_synthetic = torch.maximum(hardest_synthetic, similarity.amax(1))
    top = torch.maximum(torch.maximum(positive, hardest_negative), hardest_synthetic)

    # The softmax without its denominator, which divides the loss and the gradient's rows in the end.
    p.sub_(top[:, None]).div_(temperature).exp_()
    p_positive = ((positive - top) / temperature).exp()
    p_mixed = [((similarity - top[:, None]) / temperature).exp() for similarity in mixed]
    total = p.sum(1) + p_positive + sum(each.sum(1) for each in p_mixed)
    loss = total.log() + (top - positive) / temperature

    query_share = torch.zeros_like(positive)
    for synthetic, p_h in zip(synthetics, p_mixed, strict=True):
        _give_to_parents(p, synthetic, p_h)
        if synthetic.gradient_query_weight is not None:
            query_share += (p_h * synthetic.gradient_query_weight).sum(1)
    gradient = p @ queue
    gradient += (p_positive - total)[:, None] * key
    gradient += query_share[:, None] * query
    return loss, positive, hardest_negative, hardest_synthetic, gradient / total[:, None]


def _give_to_parents(p: Tensor, synthetic: Synthetics, p_h: Tensor) -> None:
    """Add each synthetic's probability times v_p to its parents' columns of `p`, in place."""
    p.scatter_add_(
        1, synthetic.parents.flatten(1), (p_h[..., None] * synthetic.gradient_weights).flatten(1)
    )
