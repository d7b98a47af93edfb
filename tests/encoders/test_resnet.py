"""ResNets compared with torchvision's: the same names, shapes and features."""

import pytest
import torch
import torchvision

from mochi.config import Encoder
from mochi.encoders.heads import projection_head
from mochi.encoders.resnet import ResNet, Shortcut


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_equals_torchvision(architecture: str) -> None:
    ours = ResNet(Encoder(architecture=architecture, stem="imagenet", width=64)).eval()
    theirs = getattr(torchvision.models, architecture)().eval()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(weights)  # strict: the names and shapes are torchvision's
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert ours.num_features == {"resnet18": 512, "resnet50": 2048}[architecture]


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("half", 4), ("full", 8)])
def test_small_and_narrow_variants(stem: str, side: int) -> None:
    encoder = ResNet(Encoder(architecture="resnet10", stem=stem, width=8))
    images = torch.randn(2, 3, 64, 64)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = stage(x)
    assert x.shape == (2, 64, side, side)
    assert encoder(images).shape == (2, 64)


def test_heads_are_those_of_moco() -> None:
    linear, mlp = projection_head(20, 6, "linear"), projection_head(20, 6, "mlp")
    assert [tuple(p.shape) for p in linear.parameters()] == [(6, 20), (6,)]
    assert [tuple(p.shape) for p in mlp.parameters()] == [(20, 20), (20,), (6, 20), (6,)]


@pytest.mark.parametrize("size", [33, 56])
def test_narrow_encoders_have_the_gradients_of_any_memory_format(size: int) -> None:
    """In channels-last a strided 1x1 convolution of few channels once wrote outside its memory."""
    torch.manual_seed(0)
    encoder = ResNet(Encoder(architecture="resnet10", stem="full", width=4))
    images = torch.randn(2, 3, size, size)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        encoder.zero_grad()
        encoder.to(memory_format=memory_format)
        for _ in range(5):
            encoder(images.contiguous(memory_format=memory_format)).pow(2).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [8, 16])
def test_a_shortcut_is_a_strided_convolution(channels: int) -> None:
    shortcut = Shortcut(channels, 2 * channels, 2).double()
    images = torch.randn(2, channels, 9, 12, dtype=torch.double)
    plain = torch.nn.functional.conv2d(images, shortcut.weight, stride=2)
    torch.testing.assert_close(shortcut(images), plain)
