"""Several processes of one group on this machine, as torchrun would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from mochi.runtime.distributed import process_group


def run_ranks(function: Callable[..., None], world_size: int, *arguments: Any, join: bool = True) -> None:
    """Call `function(*arguments)` in each of `world_size` processes; it must be importable.

    With `join` they form a gloo group first; without, the function does that itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.detection.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, arguments, join))
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
