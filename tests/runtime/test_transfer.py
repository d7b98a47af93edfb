"""Arrays are copied to a device with their values, several in one copy, without a wait of the host."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mochi.runtime.transfer import arrays_to, to_device
from tests.simulated_gpu import simulated_gpu

GPU = torch.device("cuda", 0)
ARRAYS: list[NDArray[Any]] = [
    np.arange(7),
    np.array([[0.5, -1.5, 2.5]], np.float32),
    np.array([True, False, True]),
    np.zeros((0, 3), np.float32),
    np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2],
]


def test_arrays_are_transferred_in_one_copy_without_a_wait() -> None:
    with simulated_gpu() as gpu:
        moved = arrays_to(GPU, *ARRAYS)
        assert gpu.copies.total() == 1
        assert not gpu.waits
        assert {tensor.device for tensor in moved} == {GPU}
        back = [tensor.cpu() for tensor in moved]
    for array, tensor, here in zip(ARRAYS, back, arrays_to(torch.device("cpu"), *ARRAYS), strict=True):
        for each in (tensor, here):
            assert each.dtype == torch.from_numpy(array).dtype
            assert np.array_equal(each.numpy(), array)
        assert here.data_ptr() == array.__array_interface__["data"][0] or not array.size


def test_a_tensor_is_transferred_without_a_wait() -> None:
    here = torch.arange(3)
    assert to_device(here, torch.device("cpu")) is here
    with simulated_gpu() as gpu:
        moved = to_device(here, GPU)
        assert moved.device == GPU
        assert not gpu.waits
        assert moved.tolist() == [0, 1, 2]
