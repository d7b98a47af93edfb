"""The loss alone: all rules of this project, and plain implementations of MoCo-v2 and MoCHi."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Measurement, Rounds, Threads, compare, conditions, table
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.rules import Rule, find, names_of
from mochi.runtime.distributed import pick_device


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs and of MoCHi's synthetics."""

    batch: int
    """Queries (B)."""
    queue: int
    """Keys in the queue (K)."""
    num_hardest: int
    """N."""
    num_pair_synthetics: int
    """s."""
    num_query_synthetics: int
    """s'."""
    dim: int = 128
    """Embedding dimension (C)."""

    def mixing(self) -> dict[str, int]:
        """The settings of the rule `mochi`."""
        return {
            "num_hardest": self.num_hardest,
            "num_pair_synthetics": self.num_pair_synthetics,
            "num_query_synthetics": self.num_query_synthetics,
        }


def main(
    batch: Annotated[int, typer.Option(min=1, help="Queries (B).")] = 256,
    queue_size: Annotated[int, typer.Option(min=2, help="Keys in the queue (K).")] = 65536,
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension (C).")] = 128,
    num_hardest: Annotated[int, typer.Option(min=2, help="Hardest negatives (N), at most K.")] = 1024,
    num_pair_synthetics: Annotated[int, typer.Option(min=0, help="Synthetics from pairs (s).")] = 512,
    num_query_synthetics: Annotated[int, typer.Option(min=0, help="Synthetics from the query (s').")] = 256,
    rounds: Rounds = 7,
    threads: Threads = 1,
) -> None:
    """Compare loss and gradient of all rules with MoCo-v2 by autograd and with materialised synthetics."""
    if num_hardest > queue_size:
        raise typer.BadParameter(f"found {num_hardest}; expected at most the queue's {queue_size}")
    torch.set_num_threads(threads)
    device = pick_device()
    sizes = Sizes(
        batch=batch,
        queue=queue_size,
        dim=dim,
        num_hardest=num_hardest,
        num_pair_synthetics=num_pair_synthetics,
        num_query_synthetics=num_query_synthetics,
    )
    print(conditions(device))
    print(
        f"B={batch} K={queue_size} C={dim} N={num_hardest} s={num_pair_synthetics} "
        f"s'={num_query_synthetics}, loss and gradient"
    )
    print("\n".join(table(run(sizes, rounds=rounds, device=device))))


def run(sizes: Sizes, *, rounds: int, device: torch.device) -> list[Measurement]:
    """Loss and gradient with respect to the query, for random unit vectors.

    No alternative can be faster than two products of (B, C) with (K, C): `two products` below.
    """
    query, key, queue = _unit_vectors(sizes, device)
    losses = _losses(sizes, key, queue)
    alternatives: dict[str, Callable[[], object]] = {
        name: partial(_backward, loss, query) for name, loss in losses.items()
    }
    alternatives["two products (lower bound)"] = lambda: (query @ queue.T) @ queue
    return compare(alternatives, rounds=rounds, device=device, memory=True, queued=True)


def all_rules(settings: Mapping[str, int]) -> dict[str, Rule]:
    """Every rule in mochi/contrast/rules/, with the settings that the rule has."""
    rules: dict[str, Rule] = {}
    for name in names_of(Rule):
        kind = find(name)
        assert issubclass(kind, Rule)
        own = {field.name for field in fields(kind)}
        rules[name] = kind(**{key: value for key, value in settings.items() if key in own})
    return rules


def _unit_vectors(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Queries (B, C), keys (B, C) and queue (K, C)."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        F.normalize(torch.randn(rows, sizes.dim, generator=generator, device=device), dim=-1)
        for rows in (sizes.batch, sizes.batch, sizes.queue)
    ]


def _losses(sizes: Sizes, key: Tensor, queue: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> the loss as a function of the queries; the first is the baseline."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "MoCo-v2, autograd": lambda query: plain_loss(query, key, queue, []),
        "MoCHi, materialised": lambda query: materialised_loss(query, key, queue, **sizes.mixing()),
    }
    for name, rule in all_rules(sizes.mixing()).items():
        label = f"{name}, ours" if rule.is_fused else f"{name}, ours by autograd"
        losses[label] = partial(_loss, key=key, queue=queue, rule=rule)
    return losses


def _backward(loss: Callable[[Tensor], Tensor], query: Tensor) -> None:
    loss(query.clone().requires_grad_()).backward()


def _loss(query: Tensor, *, key: Tensor, queue: Tensor, rule: Rule) -> Tensor:
    draws = torch.Generator(query.device).manual_seed(1)
    return contrastive_loss(query, key, queue, 0.2, rule, generator=draws).loss


def plain_loss(query: Tensor, key: Tensor, queue: Tensor, more: list[Tensor]) -> Tensor:
    """InfoNCE as in facebookresearch/moco moco/builder.py, with `more` columns of logits."""
    positive = (query * key).sum(-1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T, *more], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def materialised_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    num_hardest: int,
    num_pair_synthetics: int,
    num_query_synthetics: int,
) -> Tensor:
    """MoCHi with materialised synthetics: gather the parents, mix, normalise, multiply with the query.

    As in public re-implementations, but without their loops over queries.
    """
    device = query.device
    with torch.no_grad():
        pool = (query @ queue.T).topk(num_hardest, sorted=False).indices
        shape = (len(query), num_pair_synthetics)
        first, second = (pool.gather(1, torch.randint(num_hardest, shape, device=device)) for _ in range(2))
        weight = torch.rand(*shape, 1, device=device)
        pairs = F.normalize(weight * queue[first] + (1 - weight) * queue[second], dim=-1)
        shape = (len(query), num_query_synthetics)
        third = pool.gather(1, torch.randint(num_hardest, shape, device=device))
        weight = 0.5 * torch.rand(*shape, 1, device=device)
        mixes = F.normalize(weight * query[:, None] + (1 - weight) * queue[third], dim=-1)
    more = [torch.einsum("bc,bsc->bs", query, synthetics) for synthetics in (pairs, mixes)]
    return plain_loss(query, key, queue, more)


if __name__ == "__main__":
    typer.run(main)
