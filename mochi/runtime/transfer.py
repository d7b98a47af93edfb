"""Copy from host memory to a device without blocking the host."""

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes, a multiple of every element's size


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. The copy to a GPU is queued after its pending work."""
    if device.type == "cpu":
        return tensor.to(device)
    # From pageable memory torch would wait for the copy, and for all work before it.
    return tensor.pin_memory().to(device, non_blocking=True)


def arrays_to(device: torch.device, *arrays: NDArray[np.generic]) -> list[Tensor]:
    """Small arrays as tensors on `device`, to a GPU by a single copy."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    ends = np.cumsum([math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]).tolist()
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    slices = [
        slice(start, start + tensor.nbytes) for start, tensor in zip([0, *ends[:-1]], tensors, strict=True)
    ]
    for part, tensor in zip(slices, tensors, strict=True):
        packed[part].view(tensor.dtype).copy_(tensor.flatten())
    moved = packed.to(device, non_blocking=True)
    return [
        moved[part].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(slices, tensors, strict=True)
    ]


Batch = TypeVar("Batch")


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; a GPU prepares each on a separate stream while it computes on the previous one.

    Args:
        batches: nested lists and tuples of tensors, made when they are requested.
        device: of the batches; on a CPU nothing is done.
    """
    if device.type == "cpu":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # for memory that earlier loaders left in caches
    while True:
        # Queued when all work on the previous batch is queued, which continues in the meantime.
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in _tensors(batch):
            if tensor.is_cuda:
                tensor.record_stream(main)  # its memory is used again only when `main` is done with it
        yield batch


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
