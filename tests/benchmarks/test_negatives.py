"""The benchmark of the loss: its baseline equals `contrastive_loss`; every alternative is measured."""

import torch
from torch.nn import functional as F

from benchmarks import negatives
from mochi.contrast import rules
from mochi.contrast.loss import contrastive_loss

SIZES = negatives.Sizes(
    batch=4, queue=32, num_hardest=4, num_pair_synthetics=6, num_query_synthetics=5, dim=8
)


def test_the_baseline_is_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (
        F.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=-1)
        for rows in (4, 4, 32)
    )
    losses, gradients = [], []
    for loss in (
        lambda leaf: negatives.plain_loss(leaf, key, queue, []),
        lambda leaf: contrastive_loss(leaf, key, queue, 0.2).loss,
    ):
        leaf = query.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        losses.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_materialised_synthetics_make_the_loss_larger() -> None:
    """They are more terms of the softmax's denominator."""
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (
        F.normalize(torch.randn(rows, 8, generator=generator), dim=-1) for rows in (4, 4, 32)
    )
    plain = negatives.plain_loss(query, key, queue, [])
    assert negatives.materialised_loss(query, key, queue, **SIZES.mixing()) > plain


def test_every_alternative_is_measured() -> None:
    rows = negatives.run(SIZES, rounds=1, device=torch.device("cpu"))
    assert [row.name for row in rows] == [
        "MoCo-v2, autograd",
        "MoCHi, materialised",
        *(f"{name}, ours" for name in rules.names_of(rules.Rule)),
        "two products (lower bound)",
    ]
    assert all(row.ratios[0] > 0 for row in rows)
