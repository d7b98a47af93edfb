"""Exchanged rows and averaged gradients of several processes, compared with gathering everything."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mochi.runtime import distributed
from mochi.runtime.distributed import AveragedGradients, exchange, gather, own_slice, rank, world_size
from tests.processes import run_ranks


def exchanged() -> None:
    """Rows of any shape and layout, in orders that keep all, move all, or are random."""
    for shape in ((4,), (4, 5), (4, 3, 6, 2)):
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(rank()))
        total = world_size() * len(rows)
        orders = [torch.arange(total), torch.arange(total).roll(len(rows)), torch.arange(total).flip(0)]
        orders += [
            torch.randperm(total, generator=torch.Generator().manual_seed(seed)) for seed in range(5)
        ]
        for order in orders:
            expected = own_slice(gather(rows)[order])
            assert torch.equal(exchange(rows, order), expected)
            assert torch.equal(exchange(exchange(rows, order), order.argsort()), rows)


def averaged() -> None:
    """Gradients in several buckets; one has a parameter that one rank does not use."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    module.to(memory_format=torch.channels_last)
    module[1].bias.requires_grad_(requires_grad=False)
    unused = nn.Parameter(torch.ones(7))
    parameters = [*module.parameters(), unused]
    gradients = AveragedGradients(parameters, bucket_bytes=400)
    assert len(gradients._buckets) > 2
    for step in range(3):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank()))
        expected = torch.zeros(())
        for other in range(world_size()):
            views = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + other))
            expected = expected + module(views).square().mean() / world_size()
        wanted = torch.autograd.grad(
            expected, [parameter for parameter in module.parameters() if parameter.requires_grad]
        )
        for parameter in parameters:
            parameter.grad = None
        loss = module(images).square().mean()
        (loss + unused.sum() if rank() == 0 else loss).backward()
        gradients.wait()
        found = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter, mean in zip(found, wanted, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, mean)
            assert parameter.grad.stride() == parameter.stride()
        assert unused.grad is not None
        torch.testing.assert_close(unused.grad, torch.full((7,), 1 / world_size()))
        assert module[1].bias.grad is None


def accumulated() -> None:
    """Gradients of two backward passes, of which the second alone uses one parameter; two steps."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    second = nn.Parameter(torch.ones(8))
    parameters = [*module.parameters(), second]
    gradients = AveragedGradients(parameters, passes=2, bucket_bytes=400)
    for step in range(2):
        rows = torch.randn(
            world_size(), 2, 3, 8, generator=torch.Generator().manual_seed(step)
        )  # of each rank and pass

        def loss(rank: int, number: int, rows: torch.Tensor = rows) -> torch.Tensor:
            mean: torch.Tensor = (module(rows[rank, number]) * (second if number else 1)).square().mean()
            return mean

        total = torch.stack([loss(other, number) for other in range(world_size()) for number in range(2)])
        wanted = torch.autograd.grad(total.sum() / world_size(), parameters)
        for parameter in parameters:
            parameter.grad = None
        loss(rank(), 0).backward()
        assert not gradients._pending
        loss(rank(), 1).backward()
        # The bucket of `second` never gets both of its gradients, and other buckets come after it.
        assert not gradients._pending
        gradients.wait()
        for parameter, mean in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, mean)
    every = AveragedGradients(module.parameters(), passes=2, bucket_bytes=400)
    for _ in range(2):
        assert not every._pending
        module(torch.ones(1, 8)).sum().backward()
    assert len(every._pending) == len(every._buckets) > 2, "the last pass already has the sum"
    every.wait()


def released() -> None:
    """The memory of a module whose gradients were averaged: a job fine-tunes several detectors."""
    module = nn.Linear(8, 8)
    gradients = AveragedGradients(module.parameters())
    module(torch.ones(1, 8)).sum().backward()
    gradients.wait()
    weight = weakref.ref(module.weight)
    del module, gradients
    gc.collect()
    assert weight() is None


def everything() -> None:
    exchanged()
    averaged()
    accumulated()
    released()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_exchange_rows_and_average_gradients(processes: int) -> None:
    run_ranks(everything, processes)


def test_one_process_exchanges_and_averages_nothing() -> None:
    rows = torch.randn(6, 2)
    order = torch.randperm(6)
    assert torch.equal(exchange(rows, order), rows[order])
    module = nn.Linear(2, 1)
    gradients = AveragedGradients(module.parameters())
    module(rows).sum().backward()
    assert module.weight.grad is not None
    before = module.weight.grad.clone()
    gradients.wait()
    assert torch.equal(module.weight.grad, before)
    assert distributed.world_size() == 1
