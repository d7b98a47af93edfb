"""The loss alone: all rules of this project, and plain implementations of MoCo-v2 and MoCHi."""

import dataclasses
from collections.abc import Callable, Mapping
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


def main(
    batch: Annotated[int, typer.Option(min=1, help="Queries (B).")] = 256,
    queue_size: Annotated[int, typer.Option(min=2, help="Keys in the queue (K).")] = 65536,
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension (C).")] = 128,
    num_hardest: Annotated[int, typer.Option(min=2, help="Hardest negatives (N), at most K.")] = 1024,
    num_pairs: Annotated[int, typer.Option(min=0, help="Synthetics from pairs (s).")] = 512,
    num_query: Annotated[int, typer.Option(min=0, help="Synthetics from the query (s').")] = 256,
    rounds: Rounds = 7,
    threads: Threads = 1,
) -> None:
    """Compare loss and gradient of all rules with MoCo-v2 by autograd and with materialised synthetics."""
    if num_hardest > queue_size:
        raise typer.BadParameter(f"found {num_hardest}; expected at most the queue's {queue_size}")
    torch.set_num_threads(threads)
    device = pick_device()
    sizes = (batch, queue_size, dim, num_hardest, num_pairs, num_query)
    print(conditions(device))
    print("B={} K={} C={} N={} s={} s'={}, loss and gradient".format(*sizes))
    print("\n".join(table(run(*sizes, rounds=rounds, device=device))))


def run(
    batch: int,
    queue_size: int,
    dim: int,
    num_hardest: int,
    num_pairs: int,
    num_query: int,
    *,
    rounds: int,
    device: torch.device,
) -> list[Measurement]:
    """Loss and gradient with respect to the query, for random unit vectors.

    No alternative can be faster than two products of (B, C) with (K, C): `two products` below.
    """
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator, device=device), dim=-1)

    query, key, queue = unit(batch), unit(batch), unit(queue_size)

    def backward(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            leaf = query.clone().requires_grad_()
            loss(leaf).backward()

        return work

    def two_products() -> None:
        (query @ queue.T) @ queue

    settings = {
        "num_hardest": num_hardest,
        "num_pair_synthetics": num_pairs,
        "num_query_synthetics": num_query,
    }
    alternatives: dict[str, Callable[[], object]] = {
        "MoCo-v2, autograd": backward(lambda q: plain_loss(q, key, queue, [])),
        "MoCHi, materialised": backward(
            lambda q: materialised_loss(q, key, queue, num_hardest, num_pairs, num_query)
        ),
    }
    for name, rule in all_rules(settings).items():
        alternatives[f"{name}, ours" if rule.is_fused else f"{name}, ours by autograd"] = backward(
            partial(_loss, key=key, queue=queue, rule=rule)
        )
    alternatives["two products (lower bound)"] = two_products
    return compare(alternatives, rounds=rounds, device=device, memory=True)


def all_rules(settings: Mapping[str, int]) -> dict[str, Rule]:
    """Every rule in mochi/contrast/rules/, with the settings that the rule has."""
    made: dict[str, Rule] = {}
    for name in names_of(Rule):
        kind = find(name)
        assert issubclass(kind, Rule)
        fields = {field.name for field in dataclasses.fields(kind)}
        made[name] = kind(**{key: value for key, value in settings.items() if key in fields})
    return made


def _loss(query: Tensor, *, key: Tensor, queue: Tensor, rule: Rule) -> Tensor:
    draws = torch.Generator(query.device).manual_seed(1)
    return contrastive_loss(query, key, queue, 0.2, rule, generator=draws).loss


def plain_loss(query: Tensor, key: Tensor, queue: Tensor, more: list[Tensor]) -> Tensor:
    """InfoNCE as in facebookresearch/moco moco/builder.py, with `more` columns of logits."""
    positive = (query * key).sum(-1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T, *more], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def materialised_loss(
    query: Tensor, key: Tensor, queue: Tensor, num_hardest: int, num_pairs: int, num_query: int
) -> Tensor:
    """MoCHi with materialised synthetics: gather the parents, mix, normalise, multiply with the query.

    As in public re-implementations, but without their loops over queries.
    """
    device = query.device
    with torch.no_grad():
        pool = (query @ queue.T).topk(num_hardest, sorted=False).indices
        shape = (len(query), num_pairs)
        first, second = (pool.gather(1, torch.randint(num_hardest, shape, device=device)) for _ in range(2))
        share = torch.rand(*shape, 1, device=device)
        pairs = F.normalize(share * queue[first] + (1 - share) * queue[second], dim=-1)
        third = pool.gather(1, torch.randint(num_hardest, (len(query), num_query), device=device))
        share = 0.5 * torch.rand(len(query), num_query, 1, device=device)
        mixes = F.normalize(share * query[:, None] + (1 - share) * queue[third], dim=-1)
    more = [torch.einsum("bc,bsc->bs", query, synthetics) for synthetics in (pairs, mixes)]
    return plain_loss(query, key, queue, more)


if __name__ == "__main__":
    typer.run(main)
