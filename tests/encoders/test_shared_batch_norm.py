"""Shared batch normalisation in two processes compared with one process that has the whole batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mochi.encoders.shared_batch_norm import SharedBatchNorm2d
from mochi.runtime import distributed
from tests.processes import run_ranks
from tests.simulated_gpu import simulated_gpu

# Uneven on purpose: 1 and 3 images.
PARTS = (slice(0, 1), slice(1, 4))


def inputs(mean: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and weights of their outputs; in the third channel epsilon is as large as the variance."""
    generator = torch.Generator().manual_seed(0)
    images, weights = torch.randn(2, 4, 3, 5, 6, generator=generator)
    scale, shift = torch.tensor([3.0, 3.0, 0.003]), torch.tensor([mean, mean, 0.0])
    return images * scale[:, None, None] + shift[:, None, None], weights


def _normalise(part: slice, mean: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, weights = inputs(mean)
    x = x.to(dtype)
    layer = SharedBatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    own = x[part].clone().requires_grad_()
    output = layer(own)
    (output * weights[part]).sum().backward()
    assert own.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked == 1
    return {
        "output": output.detach(),
        "gradient": own.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def _rank(folder: Path, mean: float, dtype: torch.dtype) -> None:
    save_file(
        _normalise(PARTS[distributed.rank()], mean, dtype), folder / f"{distributed.rank()}.safetensors"
    )


def test_gpus_use_torchs_sync_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """SyncBatchNorm has fused kernels: the sums of the CPU version would read the images seven times."""
    called: list[torch.Tensor] = []

    def forward(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        called.append(images)
        return images

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with simulated_gpu():
        images = torch.ones(2, 3, 4, 4, device="cuda")
        layer = SharedBatchNorm2d(3).to("cuda")
        layer(images)
        assert called == [images]
        layer.eval()(images)
        monkeypatch.setattr(distributed, "world_size", lambda: 1)
        layer.train()(images)
    assert len(called) == 1


@pytest.mark.parametrize(
    ("mean", "dtype"), [(1.0, torch.float32), (300.0, torch.float32), (1.0, torch.bfloat16)]
)
def test_two_processes_normalise_as_one(tmp_path: Path, mean: float, dtype: torch.dtype) -> None:
    """Also if the standard deviation is a hundredth of the mean; bfloat16 has float32 statistics."""
    run_ranks(_rank, 2, tmp_path, mean, dtype)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    whole = _normalise(slice(0, 4), mean, dtype)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-4
    for name in ("output", "gradient"):
        joined = torch.cat([part[name] for part in parts])
        assert joined.dtype == dtype
        torch.testing.assert_close(joined, whole[name], rtol=rounding, atol=rounding / 2)
    for part in parts:
        torch.testing.assert_close(part["mean"], whole["mean"])
        torch.testing.assert_close(part["var"], whole["var"])


def test_one_process_normalises_as_torch() -> None:
    x, _ = inputs()
    ours, theirs = SharedBatchNorm2d(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
