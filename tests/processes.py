"""Processes for tests, forked from one that has imported what they need, which takes seconds."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import chdir, nullcontext
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

from mochi.runtime.distributed import process_group
from tests.project import ROOT

_IMPORTED = [
    "pytest",
    "torch._dynamo",  # the first optimizer imports it
    "mochi.pretraining.stage",
    "mochi.evaluation.stage",
    "mochi.evaluation.tasks.linear.training",
    "mochi.detection.stage",
]


def context() -> ForkServerContext:
    """Starts processes without importing again; their function must be importable."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(_IMPORTED)
    with chdir(ROOT):  # Python 3.11 finds modules only here, and ignores those that it does not find
        forkserver.ensure_running()
    return forks


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any, join: bool = True) -> None:
    """Call `function(*arguments)` in each of `world_size` processes, as torchrun would start them here.

    With `join` they form a gloo group first; without, the function does that itself.
    """
    forks = context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        forks.Process(target=_rank, args=(rank, world_size, port, function, arguments, join))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Any, join: bool
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with process_group(torch.device("cpu")) if join else nullcontext():
        function(*arguments)
