r"""The contrastive loss over real and synthetic negatives, with its gradient, as one function.

    L = -log( e^{q.k/tau} / (e^{q.k/tau} + sum_n e^{q.n/tau} + sum_h e^{q.h/tau}) )      (MoCHi eq. 1)

A synthetic h is a weighted sum of its parents n_i (see `negatives`), so with p the softmax over all columns

    dL/dq = ( (p_k - 1) k + sum_n p_n n + sum_h p_h (v_q q + sum_i v_i n_i) ) / tau.

Adding each p_h v_i to the probability of its parent's column leaves one product of the (B, K)
probabilities with the queue. The forward pass computes this gradient while the probabilities are
available: no synthetic vector, no second (B, K) buffer, no scatter in a backward pass. The loss with mixing
takes less time than MoCo's without mixing under autograd (`python -m benchmarks.negatives`).

Other rules of negatives (`mochi.contrast.rules`) have another L and other p. A rule that computes them
in place costs as little; otherwise autograd differentiates its loss, a few queries at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mochi.contrast.rules import Candidates, Rule, Similarities
from mochi.contrast.rules.moco import MoCo
from mochi.errors import UserError

# Queries that a CPU processes at once. Fewer would read the queue too often, more would use more memory.
_QUERY_CHUNK = 64


class Contrast(NamedTuple):
    """A loss and its statistics."""

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
    generator: torch.Generator | None = None,
) -> Contrast:
    """Compute the loss of queries and keys against the queue, by a rule of negatives.

    Computed in float32 even under autocast (float64 for float64 inputs). Only `query` gets a gradient.

    Args:
        query: (B, C) unit queries.
        key: (B, C) unit keys, their positives.
        queue: (K, C) unit keys, the negatives.
        temperature: tau, > 0; divides synthetic logits too.
        rule: how much each negative counts, and which synthetics are added; None: MoCo.
        excluded: (B, K) bool, negatives to exclude from the loss and from every mix. A query without any
            negative left contributes neither loss nor gradient.
        generator: for the synthetics; None: torch's global one of the device.

    Raises:
        UserError: the inputs do not fit each other (a ValueError). Their lengths are not checked.

    Source: Kalantidis et al. 2020, eq. 1 and section 3; He et al. 2020, eq. 1.
    """
    rule = rule or MoCo()
    _check(query, key, queue, temperature, rule, excluded)
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        tensors = (query.to(dtype), key.detach().to(dtype), queue.detach().to(dtype))
        return Contrast(*_Contrast.apply(*tensors, temperature, rule, excluded, generator))


def chance_level(rule: Rule, queue_size: int, temperature: float) -> float:
    """The rule's loss if all similarities are equal, nats: that of an encoder that has learnt nothing."""
    equal = torch.zeros(1, 1 + queue_size + rule.num_synthetics, dtype=torch.float64)
    return rule.loss(equal[:, 0], equal[:, 1:], temperature).item()


def _check(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, rule: Rule, excluded: Tensor | None
) -> None:
    """Check types, shapes, devices and the rule's settings; no value on a device is read.

    Raises:
        UserError: they do not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("queue", queue)):
        if not tensor.is_floating_point() or tensor.ndim != 2 or not len(tensor):
            raise UserError(
                f"{name}: found {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "expected unit vectors of a floating-point type, at least one row"
            )
        if tensor.device != query.device:
            raise UserError(f"{name}: found on {tensor.device}; the queries are on {query.device}")
    if query.shape != key.shape or query.shape[1] != queue.shape[1]:
        raise UserError(
            f"query, key, queue: found shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(queue.shape)}; expected (B, C), (B, C) and (K, C)"
        )
    if not temperature > 0:
        raise UserError(f"temperature: found {temperature}; expected a number above 0, such as 0.2")
    expected = (len(query), len(queue))
    if excluded is not None and (excluded.dtype != torch.bool or excluded.shape != expected):
        raise UserError(
            f"excluded: found {excluded.dtype} of shape {tuple(excluded.shape)}; "
            f"expected bool of shape {expected}"
        )
    try:
        rule.check(len(queue))
    except ValueError as error:
        raise UserError(str(error)) from None


class _Contrast(torch.autograd.Function):
    """Forward gives the loss and stores its gradient, (B, C); backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        queue: Tensor,
        temperature: float,
        rule: Rule,
        excluded: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A GPU processes all queries at once; a CPU a few, in a buffer that stays in its cache."""
        few = query.device.type == "cpu" or rule.makes_vectors
        size = min(_QUERY_CHUNK, len(query)) if few else len(query)
        buffer = query.new_empty(size if rule.is_fused else 0, len(queue))
        parts = []
        for start in range(0, len(query), size):
            rows = slice(start, start + size)
            own = (query[rows], key[rows], queue, temperature, rule)
            left_out = None if excluded is None else excluded[rows]
            if rule.is_fused:
                parts.append(_fused_rows(*own, left_out, generator, buffer[: len(query[rows])]))
            else:
                parts.append(_differentiated_rows(*own, left_out, generator))
        loss, positive, hardest_negative, hardest_synthetic, gradient = map(
            torch.cat, zip(*parts, strict=True)
        )
        if excluded is not None:
            nothing_left = excluded.all(1)
            hardest_negative.masked_fill_(nothing_left, -torch.inf)
            loss.masked_fill_(nothing_left, 0)
            gradient.masked_fill_(nothing_left[:, None], 0)
        ctx.save_for_backward(gradient.div_(temperature * len(query)))
        ctx.mark_non_differentiable(positive, hardest_negative, hardest_synthetic)
        return loss.mean(), positive, hardest_negative, hardest_synthetic

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        """(B, C) for the query; key, queue and synthetics are constants."""
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None, None, None, None


_Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The loss of each query, q.k, the largest q.n and q.h, (B,) each; and its gradient times tau, (B, C)."""


def _fused_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    rule: Rule,
    excluded: Tensor | None,
    generator: torch.Generator | None,
    p: Tensor,
) -> _Rows:
    """Loss and gradient from `rule.fused`. `p` (B, K) has similarities first, weights at the end."""
    torch.mm(query, queue.T, out=p)
    if excluded is not None:
        p.masked_fill_(excluded, -torch.inf)
    positive = (query * key).sum(-1)  # (B,)
    synthetics = rule.synthetics(Candidates(query, p, queue, excluded is not None, generator))
    mixed = [synthetic.similarity(query, p) for synthetic in synthetics]  # (B, S) each
    hardest_negative, hardest_synthetic = _hardest(positive, p, mixed)
    hardest = torch.maximum(hardest_negative, hardest_synthetic)
    num: Tensor | int = p.shape[1] + sum(each.shape[1] for each in mixed)
    if excluded is not None:
        num = num - excluded.sum(1)

    weights = rule.fused(Similarities(positive, [p, *mixed], hardest, num), temperature)
    for synthetic, p_h in zip(synthetics, mixed, strict=True):
        synthetic.scatter_to_parents(p_h, p)
    gradient = p @ queue
    gradient += weights.positive[:, None] * key
    for synthetic, p_h in zip(synthetics, mixed, strict=True):
        if (rest := synthetic.rest_of_gradient(p_h, query)) is not None:
            gradient += rest
    gradient = gradient / weights.divisor[:, None]
    return weights.loss, positive, hardest_negative, hardest_synthetic, gradient


def _differentiated_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    rule: Rule,
    excluded: Tensor | None,
    generator: torch.Generator | None,
) -> _Rows:
    """Loss and gradient by autograd, at once, so that it stores activations of these queries only."""
    with torch.enable_grad():
        query = query.detach().requires_grad_()
        positive = (query * key).sum(-1)
        similarity = query @ queue.T
        if excluded is not None:
            # Except for a query without other negatives: its loss is set to 0 later, but must not be NaN.
            excluded = excluded & ~excluded.all(1, keepdim=True)
            similarity = similarity.masked_fill(excluded, -torch.inf)
        synthetics = rule.synthetics(Candidates(query, similarity, queue, excluded is not None, generator))
        mixed = [synthetic.similarity(query, similarity) for synthetic in synthetics]
        loss = rule.loss(positive, torch.cat([similarity, *mixed], 1) if mixed else similarity, temperature)
        if loss.shape != positive.shape:
            raise ValueError(
                f"{type(rule).__name__}.loss: found shape {tuple(loss.shape)}; expected "
                f"{tuple(positive.shape)}, the loss of each query, not their mean"
            )
        (gradient,) = torch.autograd.grad(loss.sum(), query)
    hardest = _hardest(positive, similarity, mixed)
    tensors = (loss, positive, *hardest, gradient * temperature)
    loss, positive, hardest_negative, hardest_synthetic, gradient = (each.detach() for each in tensors)
    return loss, positive, hardest_negative, hardest_synthetic, gradient


def _hardest(positive: Tensor, similarity: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B,) the largest q.n and the largest q.h, -inf without synthetics."""
    hardest_synthetic = torch.full_like(positive, -torch.inf)
    for each in mixed:
        hardest_synthetic = torch.maximum(hardest_synthetic, each.amax(1))
    return similarity.amax(1), hardest_synthetic
