"""Where no CUDA graph can be made, training continues without. `tests/gpu` has the tests of real graphs."""

from contextlib import nullcontext
from typing import NoReturn

import pytest
import torch
from torch import nn

from mochi.encoders.batch_norm import GroupedBatchNorm2d
from mochi.runtime import cuda_graphs
from mochi.runtime.cuda_graphs import parallel_branches, use_cuda_graph
from tests.processes import run_ranks
from tests.simulated_gpu import simulated_gpu


def an_encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), GroupedBatchNorm2d(4, 2), nn.Flatten())


def test_a_cpu_calls_the_module_as_before(caplog: pytest.LogCaptureFixture) -> None:
    encoder = an_encoder()
    use_cuda_graph(encoder, torch.randn(4, 3, 5, 5))
    assert "forward" not in vars(encoder)
    assert not caplog.text


def test_a_capture_that_fails_is_a_warning_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Warm-up calls before the capture update running statistics."""
    with simulated_gpu():
        encoder = an_encoder().to("cuda")
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        use_cuda_graph(encoder, torch.randn(4, 3, 5, 5, device="cuda"))
        assert "kernels are launched one by one" in caplog.text
        assert "a simulated GPU records nothing" in caplog.text
        assert "forward" not in vars(encoder)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(parameter.grad is None for parameter in encoder.parameters())


def use_cuda_graph_on_a_rank() -> None:
    def capture(*_: object) -> NoReturn:
        raise AssertionError("captured in a run of several processes")

    cuda_graphs._Replayed = capture  # type: ignore[assignment,misc]
    with simulated_gpu():
        encoder = an_encoder().to("cuda")
        use_cuda_graph(encoder, torch.randn(4, 3, 5, 5, device="cuda"))


def test_several_processes_launch_kernels_one_by_one() -> None:
    """They average gradients during the backward pass."""
    run_ranks(use_cuda_graph_on_a_rank, 2)


def test_branches_stay_in_order_outside_a_capture() -> None:
    with parallel_branches(torch.device("cpu"), 3) as branch:
        for number in range(3):
            assert isinstance(branch(number), nullcontext)
