"""Devices and collective operations. With a single process a collective operation changes nothing."""

import os
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi.errors import UserError
from mochi.runtime import watchdog
from mochi.runtime.launch import REQUESTED_GPUS
from mochi.runtime.transfer import to_device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group described by torchrun's environment; do nothing without one.

    Raises:
        UserError: another process did not start.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, number, size = watchdog.meet()
    with watchdog.watching(store, number, size):
        backend, where = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, device_id=where)
        yield
        # Not after an error: it may wait for processes that wait for this one.
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device() -> torch.device:
    """This process's GPU if there is one, else the CPU; the GPU becomes CUDA's current device.

    MOCHI_DEVICE=cpu in the environment always computes on the CPU.

    Raises:
        UserError: GPUs were requested (`--gpus`) and torch cannot use as many.
    """
    requested = int(os.environ.get(REQUESTED_GPUS, "0"))
    if os.environ.get("MOCHI_DEVICE") == "cpu":
        return torch.device("cpu")
    check_gpus(requested)
    if not (torch.cuda.is_available() and torch.cuda.device_count()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    # Otherwise helper threads and libraries open a context on GPU 0 in every process.
    torch.cuda.set_device(device)
    return device


def check_gpus(requested: int) -> None:
    """Raise UserError if torch cannot use as many GPUs."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable < requested:
        wheel = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise UserError(
            f"GPUs: {requested} were requested, and torch {torch.__version__} can use {usable}; its wheel "
            f"is {wheel}, the driver is {driver()}, CUDA_VISIBLE_DEVICES is {shown or 'empty'}; check "
            "`nvidia-smi` and that variable, update the driver, or pass --gpus 0 to compute on the CPU"
        )


def driver() -> str:
    """The version of NVIDIA's kernel driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "not loaded"
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]+)", text)
    return found[1] if found else "of an unknown version"


def gather(rows: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world * B, ...) in rank order, identical on every rank; no gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def own_slice(rows: Tensor) -> Tensor:
    """This rank's part of the result of `gather`."""
    size = len(rows) // world_size()
    return rows[rank() * size : (rank() + 1) * size]


def exchange(rows: Tensor, order: Tensor) -> Tensor:
    """`own_slice(gather(rows)[order])`, but each rank sends only the rows that another rank needs.

    Args:
        rows: (B, ...) of this rank; no gradient.
        order: (world * B,) a permutation of the rows of all ranks, the same on every rank, on the CPU.
    """
    if world_size() == 1:
        return rows[to_device(order, rows.device)]
    wanted = order.view(world_size(), -1)  # (world, B): the rows that each rank needs
    source = wanted // len(rows)
    sent = wanted[source == rank()] - rank() * len(rows)  # by the rank that needs them
    mine = source[rank()]
    outgoing = rows[to_device(sent, rows.device)].contiguous()
    received = torch.empty_like(outgoing)
    dist.all_to_all_single(
        received,
        outgoing,
        torch.bincount(mine, minlength=world_size()).tolist(),
        (source == rank()).sum(1).tolist(),
    )
    # Rows arrive sorted by source rank, and from each rank in the requested order.
    return received[to_device(mine.argsort(stable=True).argsort(), rows.device)]


class AveragedGradients:
    """Average gradients over ranks during the backward pass.

    Gradients are summed in buckets, last layers first, as soon as a bucket is complete.
    `wait` must follow the last backward pass of each step. With one process nothing happens.

    Args:
        parameters: those with `requires_grad` are averaged; one without a gradient counts as zero.
        passes: backward passes of a step, which accumulate; ranks communicate during the last one only.
        bucket_bytes: size of a bucket.

    Like torch's DistributedDataParallel, but with fixed buckets: DDP rebuilds them after its first step and
    then sums in a different order, so a resumed run would differ from an uninterrupted one.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], passes: int = 1, bucket_bytes: int = 25 << 20
    ) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        self._passes, self._done = passes, Counter[nn.Parameter]()
        self._pending: list[tuple[dist.Work, Tensor, list[nn.Parameter], list[Tensor]]] = []
        if world_size() == 1:
            return
        # A strong reference would be a cycle through C++: Python would never free the parameters.
        own = weakref.ref(self)

        def ready(parameter: nn.Parameter) -> None:
            if (gradients := own()) is not None:
                gradients._ready(parameter)

        room = 0
        for parameter in reversed([each for each in parameters if each.requires_grad]):
            if parameter.nbytes > room or self._buckets[-1][0].dtype != parameter.dtype:
                self._buckets.append([])
                room = max(bucket_bytes, parameter.nbytes)
            self._buckets[-1].append(parameter)
            room -= parameter.nbytes
            parameter.register_post_accumulate_grad_hook(ready)

    def _ready(self, parameter: nn.Parameter) -> None:
        """Start the sums of the next complete buckets, in the same order on every rank."""
        self._done[parameter] += 1
        while len(self._pending) < len(self._buckets):
            bucket = self._buckets[len(self._pending)]
            if any(self._done[each] < self._passes for each in bucket):
                return
            self._start(bucket)

    def _start(self, bucket: list[nn.Parameter]) -> None:
        """Sum a bucket over ranks; a missing gradient on this rank counts as zero."""
        flat = bucket[0].new_empty(sum(parameter.numel() for parameter in bucket))
        parts = [
            # With the parameter's strides, as the optimizer needs them.
            part.as_strided(parameter.shape, parameter.stride())
            for part, parameter in zip(flat.split([each.numel() for each in bucket]), bucket, strict=True)
        ]
        for part, parameter in zip(parts, bucket, strict=True):
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad)
        self._pending.append((dist.all_reduce(flat, async_op=True), flat, bucket, parts))

    def wait(self) -> None:
        """Wait until each gradient is its mean over ranks."""
        for bucket in self._buckets[len(self._pending) :]:
            self._start(bucket)
        for work, flat, bucket, parts in self._pending:
            work.wait()
            flat.div_(world_size())
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part
        self._pending.clear()
        self._done.clear()


def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of batch normalisation with their mean over ranks.

    On each rank they are means over the groups of images that this rank has processed.
    """
    tensors = [buffer for name, buffer in module.named_buffers() if "running_" in name]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a statistic over ranks."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()
