"""CUDA graphs: launch all kernels of an encoder with one call.

A training step has thousands of kernels. The host needs longer to launch them one by one than the GPU to
compute them (`python -m benchmarks.gpu`). A CUDA graph records them once and replays them. The kernels are
the same, so the results are too.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mochi.runtime.distributed import world_size

logger = logging.getLogger(__name__)

_WARM_UP_CALLS = 3
"""Before a capture: libraries choose kernels and reserve memory in their first calls."""


def use_cuda_graph(module: nn.Module, images: Tensor) -> None:
    """Let `module`, in training mode, replay CUDA graphs of its forward and its backward pass.

    Only on a GPU, and in a run of one process: with several, gradients are averaged while the backward pass
    still runs. If the capture fails, nothing changes, with a warning. Activations stay in memory between
    steps.

    The next call overwrites the output. Each backward pass must come before the next forward pass, and
    overwrites the gradients of the last: set them to None, do not accumulate. There is no gradient with
    respect to the images.

    Args:
        module: maps images to one tensor, without random numbers or synchronisation; its parameters and
            buffers may be changed in place, but not replaced.
        images: (B, 3, H, W); later calls must have the same shape and the same autocast settings.
    """
    if images.device.type != "cuda" or world_size() > 1:
        return
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        replayed = _Replayed(module, images)
    except RuntimeError as error:
        logger.warning("kernels are launched one by one, because no CUDA graph can be made: %s", error)
        return
    finally:
        torch.cuda.synchronize(images.device)  # warm-up calls on another stream write them too
        for buffer, before in buffers:  # running statistics
            buffer.copy_(before)
    one_by_one = module.forward

    def forward(images: Tensor) -> Any:
        return replayed(images) if module.training else one_by_one(images)

    module.forward = forward


class _Replayed:
    """Two CUDA graphs of a module, one for each pass."""

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.images = images.clone()
        device = images.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        # Without a cache each replay casts the weights again.
        with torch.autocast(device.type, dtype, enabled, cache_enabled=False):
            with torch.cuda.stream(stream):
                # cuBLAS warns if its call is the first of autograd's thread.
                torch.zeros(1, device=device, requires_grad=True).exp().backward()
                for _ in range(_WARM_UP_CALLS):
                    output = module(self.images)
                    self._differentiate(output, torch.zeros_like(output))
                del output
            # In other threads loading continues, which allocates pinned memory.
            capture = partial(torch.cuda.graph, stream=stream, capture_error_mode="thread_local")
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capture(self.forward):
                output = module(self.images)
            self.output_gradient = torch.zeros_like(output)
            self.gradients: tuple[Tensor, ...] = ()
            if self.parameters:
                with capture(self.backward, pool=self.forward.pool()):
                    self.gradients = self._differentiate(output, self.output_gradient)
            self.output = output.detach()

    def _differentiate(self, output: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.parameters, gradient) if self.parameters else ()

    def __call__(self, images: Tensor) -> Tensor:
        """What the module computes for the images."""
        output: Tensor = _Replay.apply(self, images, *self.parameters)
        return output


class _Replay(torch.autograd.Function):
    """The graphs, as a function of the images and the parameters."""

    @staticmethod
    def forward(ctx: Any, graphs: _Replayed, images: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ARG004
        ctx.graphs = graphs
        graphs.images.copy_(images)
        graphs.forward.replay()
        output: Tensor = graphs.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Replayed = ctx.graphs
        graphs.output_gradient.copy_(gradient[0])
        graphs.backward.replay()
        return None, None, *(each.detach() for each in graphs.gradients)


@contextmanager
def parallel_branches(
    device: torch.device, count: int
) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Compute independent branches concurrently, in the CUDA graph that is being captured.

    Outside a capture the branches run in order: launching on several streams would cost the host more than
    it saves.

    Args:
        device: of the computation.
        count: number of branches.

    Yields:
        The context in which a branch is computed, by the branch's number.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda _: nullcontext()
        return
    main = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(count)]
    for stream in streams:
        stream.wait_stream(main)
    yield lambda branch: torch.cuda.stream(streams[branch])
    for stream in streams:
        main.wait_stream(stream)
