"""From the host's memory to a device, without making the host wait for it."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes, a multiple of every element's size


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. The copy to a GPU is queued behind the work that the GPU has."""
    if device.type == "cpu":
        return tensor.to(device)
    # From pageable memory torch would wait for the copy, and with it for all work before it.
    return tensor.pin_memory().to(device, non_blocking=True)


def arrays_to(device: torch.device, *arrays: NDArray[np.generic]) -> list[Tensor]:
    """Small arrays as tensors on `device`, to a GPU by a single copy."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    ends = np.cumsum([math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]).tolist()
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    places = [
        slice(start, start + tensor.nbytes) for start, tensor in zip([0, *ends[:-1]], tensors, strict=True)
    ]
    for place, tensor in zip(places, tensors, strict=True):
        packed[place].view(tensor.dtype).copy_(tensor.flatten())
    moved = packed.to(device, non_blocking=True)
    return [
        moved[place].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, tensors, strict=True)
    ]
