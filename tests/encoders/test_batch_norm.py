"""Grouped batch normalisation compared with one torch layer for each group, bit by bit."""

import pytest
import torch
from torch.nn import functional as F

from mochi.encoders.batch_norm import GroupedBatchNorm2d


def per_group(layer: GroupedBatchNorm2d, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`tensor_split` and one batch norm for each group; the output and the new running statistics."""
    means, variances, outputs = [], [], []
    for group in images.tensor_split(layer.num_groups):
        mean, var = torch.zeros(images.shape[1]), torch.ones(images.shape[1])
        outputs.append(F.batch_norm(group, mean, var, layer.weight, layer.bias, True, 0.1, layer.eps))
        means.append(mean)
        variances.append(var)
    return torch.cat(outputs), [torch.stack(means).mean(0), torch.stack(variances).mean(0)]


@pytest.mark.parametrize(("batch_size", "num_groups"), [(8, 2), (7, 3), (11, 4), (6, 3), (5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_to_a_layer_for_each_group(
    batch_size: int, num_groups: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Under autocast the input is bfloat16; parameters and statistics stay float32."""
    torch.manual_seed(0)
    layer = GroupedBatchNorm2d(5, num_groups)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    images = torch.randn(batch_size, 5, 4, 6).to(dtype).contiguous(memory_format=memory_format)
    upstream = torch.randn(batch_size, 5, 4, 6)
    results = []
    for grouped in (False, True):
        own = images.clone().requires_grad_()
        layer.zero_grad()
        output, statistics = per_group(layer, own) if not grouped else (layer(own), [])
        (output * upstream).sum().backward()
        assert own.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        statistics = statistics or [layer.running_mean, layer.running_var]
        gradients = [own.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]
        results.append([output.detach(), *gradients, *statistics])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
        assert expected.dtype == actual.dtype
        assert expected.stride() == actual.stride()
    assert int(layer.num_batches_tracked) == 1


def test_groups_have_their_own_statistics() -> None:
    batch = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch[4:] += 10
    grouped, plain = GroupedBatchNorm2d(3, 2), torch.nn.BatchNorm2d(3)
    expected = torch.cat([torch.nn.BatchNorm2d(3)(half) for half in batch.chunk(2)])
    torch.testing.assert_close(grouped(batch), expected)
    assert not torch.allclose(plain(batch), expected)
    torch.testing.assert_close(grouped.running_mean, 0.1 * batch.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(GroupedBatchNorm2d(3, 1)(batch), plain(batch))


@pytest.mark.parametrize("wanted", ["weight", "input"])
def test_only_required_gradients_are_computed(wanted: str) -> None:
    layer, images = GroupedBatchNorm2d(3, 2), torch.randn(4, 3, 5, 5)
    layer.requires_grad_(wanted == "weight")
    images.requires_grad_(wanted == "input")
    layer(images).square().sum().backward()
    assert (images.grad is None) == (wanted == "weight")
    assert (layer.weight.grad is None) == (layer.bias.grad is None) == (wanted == "input")
    with torch.no_grad():
        assert not layer(images).requires_grad


def test_autograd_sees_one_operation() -> None:
    """Not a `cat` of the groups, which copies all activations, and not a slice for each group, whose
    backward pass fills a whole batch with zeros.
    """
    layer = GroupedBatchNorm2d(3, 4)
    output = layer(torch.randn(8, 3, 4, 4, requires_grad=True))
    names, waiting = [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    assert sorted(names) == ["_GroupedBackward", *(["torch::autograd::AccumulateGrad"] * 3)]


def test_in_evaluation_mode_it_equals_torchs_for_any_groups() -> None:
    images = torch.randn(6, 3, 4, 4)
    grouped, plain = GroupedBatchNorm2d(3, 2), torch.nn.BatchNorm2d(3)
    for layer in (grouped, plain):
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.3, 1.0, 4.0]))
        layer.eval()
    assert torch.equal(grouped(images), plain(images))
    assert int(grouped.num_batches_tracked) == 0
