"""Measurements on the negatives of a training step (MoCHi's figures 2 and 3).

Computed on one batch per epoch from the inputs of the loss, separately from the loss.
"""

import torch
from torch import Tensor

from mochi.contrast.moco import Step
from mochi.contrast.rules import Candidates

NUM_HARDEST = 1024
"""The paper analyses the 1024 hardest negatives (figures 2a and 2c) of a queue of 16,384 (ImageNet-100)."""


def num_hardest(queue_size: int) -> int:
    """How many negatives count as the hardest: a sixteenth of the queue, as in the paper, at most 1024."""
    return min(NUM_HARDEST, max(queue_size // 16, 1))


@torch.no_grad()
def matching_probabilities(step: Step, temperature: float) -> Tensor:
    """Mean matching probability of each query's hardest negatives, hardest first (figure 2a).

    Returns:
        (min(1024, K),) p_n of the softmax over the positive and the real negatives of the queue, without
        those that a mask excludes.
    """
    positive = (step.query * step.key).sum(-1, keepdim=True)  # (B, 1)
    logits = torch.cat((positive, _masked(step, step.query @ step.queue.T)), 1) / temperature
    probabilities = logits.softmax(1)[:, 1:]
    return probabilities.topk(min(NUM_HARDEST, len(step.queue)), dim=1).values.mean(0)


@torch.no_grad()
def false_negatives(step: Step, labels: Tensor) -> dict[str, float]:
    """Fractions of false negatives, of the same class by label (figures 2c and 3c); empty without labels.

    Args:
        step: the training step.
        labels: (B,) classes of the queries, -1 where unknown; unlabelled queries and keys do not count.

    Returns:
        `false_negatives`: among the hardest of the queue (`num_hardest`), whether or not a mask excludes
        them; with synthetics also `false_parents_any` (mixed from at least one) and `false_parents_all`
        (from false negatives only).
    """
    known = labels >= 0
    if not known.any() or not (step.queue_labels >= 0).any():
        return {}
    similarity = step.query @ step.queue.T
    same = (labels[:, None] == step.queue_labels)[known]  # (B', K)
    hardest = similarity[known].topk(num_hardest(len(step.queue)), dim=1).indices
    shares = {"false_negatives": same.gather(1, hardest).float().mean().item()}
    any_parent, all_parents = [], []
    for parents in _parents(step, _masked(step, similarity)):
        own = parents[known]  # (B', S, P)
        false = same.gather(1, own.flatten(1)).view_as(own)
        any_parent.append(false.any(-1))
        all_parents.append(false.all(-1))
    if any_parent:
        shares["false_parents_any"] = torch.cat(any_parent, 1).float().mean().item()
        shares["false_parents_all"] = torch.cat(all_parents, 1).float().mean().item()
    return shares


@torch.no_grad()
def rule_measurements(step: Step, temperature: float) -> dict[str, Tensor]:
    """The measurements of the step's rule of negatives, () means over the queries."""
    positive = (step.query * step.key).sum(-1)
    similarity = _masked(step, step.query @ step.queue.T)
    columns = step.rule.measure(positive, similarity, temperature)
    return {name: value.float().mean() for name, value in columns.items()}


def _parents(step: Step, similarity: Tensor) -> list[Tensor]:
    """(B, S, P) the parents of each kind of synthetic, drawn once more for the queries of the step."""
    masked = step.excluded is not None
    candidates = Candidates(step.query, similarity, step.queue, masked, step.generator)
    return [synthetic.parents for synthetic in step.rule.synthetics(candidates)]


def _masked(step: Step, similarity: Tensor) -> Tensor:
    """(B, K) similarities, -inf where a mask excludes a negative."""
    return similarity if step.excluded is None else similarity.masked_fill(step.excluded, -torch.inf)
