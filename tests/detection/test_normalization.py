"""Shared batch normalisation on two processes against one process with both parts; precise statistics
against their definition."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mochi.detection.normalization import SharedBatchNorm2d, recompute_statistics
from mochi.runtime import distributed
from tests.detection.ranks import run_ranks

# Uneven on purpose: 1 and 3 images.
PARTS = (slice(0, 1), slice(1, 4))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 6, generator=generator) * 3 + 1, torch.randn(
        4, 3, 5, 6, generator=generator
    )


def _normalise(part: slice) -> dict[str, torch.Tensor]:
    x, weights = inputs()
    layer = SharedBatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    own = x[part].clone().requires_grad_()
    output = layer(own)
    (output * weights[part]).sum().backward()
    assert own.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return {
        "output": output.detach(),
        "gradient": own.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def _rank(folder: Path) -> None:
    save_file(_normalise(PARTS[distributed.rank()]), folder / f"{distributed.rank()}.safetensors")


def test_two_processes_normalise_as_one(tmp_path: Path) -> None:
    run_ranks(_rank, 2, tmp_path)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    whole = _normalise(slice(0, 4))
    for name in ("output", "gradient"):
        torch.testing.assert_close(
            torch.cat([part[name] for part in parts]), whole[name], rtol=1e-4, atol=1e-5
        )
    for part in parts:
        torch.testing.assert_close(part["mean"], whole["mean"])
        torch.testing.assert_close(part["var"], whole["var"])


def test_one_process_normalises_as_torch() -> None:
    x, _ = inputs()
    ours, theirs = SharedBatchNorm2d(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_precise_statistics_are_means_over_batches() -> None:
    batches = [torch.randn(4, 3, 5, 5) * scale for scale in (1, 2, 5)]
    layer, frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
    model = nn.Sequential(layer, frozen)
    assert recompute_statistics(model, batches, model) == 3
    variances = [batch.transpose(0, 1).flatten(1).var(dim=1) for batch in batches]
    means = [batch.mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0))
    assert layer.momentum == 0.1
    assert torch.equal(frozen.running_mean, torch.zeros(3))
    # No batches: nothing changes.
    before = layer.running_var.clone()
    assert recompute_statistics(model, [], model) == 0
    assert torch.equal(layer.running_var, before)
