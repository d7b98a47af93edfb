"""ResNets compared with torchvision's: the same names, shapes and features."""

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from mochi.config import Encoder
from mochi.config.training import RESNETS
from mochi.encoders import build
from mochi.encoders.heads import projection_head
from mochi.encoders.resnet import LAYOUTS, ResNet, Shortcut


@pytest.mark.parametrize(
    ("architecture", "stem"),
    [*((name, "imagenet") for name in RESNETS), ("resnet10", "half"), ("resnet10", "full")],
)
def test_equals_torchvision(architecture: str, stem: str) -> None:
    with torch.device("meta"):  # no initial weights, as they are replaced
        ours = build(Encoder(architecture=architecture, stem=stem, width=64)).eval()
        theirs = _torchvisions(architecture, stem).eval()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: _random(name, value, generator)
        for name, value in theirs.state_dict().items()
        if not name.startswith("fc.")
    }
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(weights, assign=True)
    ours.load_state_dict(weights, assign=True)  # strict: names and shapes equal torchvision's
    images = torch.randn(2, 3, 65, 63, generator=generator)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().mean() > 0.01 * expected.abs().mean()  # the images matter
    assert ours.num_features == expected.shape[1]


def _torchvisions(architecture: str, stem: str) -> torchvision.models.ResNet:
    """torchvision's network; for small images with a 3x3 convolution of stride 2 or 1 as its stem."""
    if architecture == "resnet10":
        network = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    else:
        network = getattr(torchvision.models, architecture)()
    if stem != "imagenet":
        network.conv1 = torch.nn.Conv2d(3, 64, 3, 2 if stem == "half" else 1, 1, bias=False)
        network.maxpool = torch.nn.Identity()
    return network


def _random(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights and statistics that keep the size of activations from layer to layer."""
    if not value.is_floating_point():
        return torch.tensor(0)
    normal = torch.randn(value.shape, generator=generator)
    if value.ndim == 4:
        return normal * (2 / value[0].numel()) ** 0.5
    return 0.7 + 0.1 * normal if name.endswith(("weight", "var")) else 0.1 * normal


def test_the_registry_matches_the_configuration() -> None:
    assert tuple(LAYOUTS) == RESNETS


@pytest.mark.parametrize(("architecture", "width"), [("resnext50_32x4d", 32), ("wide_resnet50_2", 8)])
def test_narrow_variants_of_wide_networks(architecture: str, width: int) -> None:
    encoder = build(Encoder(architecture=architecture, stem="full", width=width))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 32 * width) == (2, encoder.num_features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "resnet19", "stem": "half", "width": 8}, "found 'resnet19'; did you mean"),
        ({"architecture": "resnet18", "stem": "half"}, "width: missing; resnet18 needs a stem and a width"),
        (
            {"architecture": "resnext50_32x4d", "stem": "half", "width": 24},
            "width: found 24; .* of 16",
        ),
        ({"architecture": "timm:x", "stem": "half"}, "stem, width: found half, None; timm:x fixes them"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder.model_validate(settings)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("half", 4), ("full", 8)])
def test_small_and_narrow_variants(stem: str, side: int) -> None:
    encoder = ResNet(Encoder(architecture="resnet10", stem=stem, width=8))
    images = torch.randn(2, 3, 64, 64)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    x = encoder.layer3(encoder.layer2(encoder.layer1(x)))
    assert x.shape[:2] == (2, 32)
    assert [side * encoder.stride for side in x.shape[2:]] == [64, 64]
    assert encoder.layer4(x).shape == (2, 64, side, side)
    assert encoder(images).shape == (2, 64)


def test_heads_equal_mocos() -> None:
    linear, mlp = projection_head(20, 6, "linear"), projection_head(20, 6, "mlp")
    assert [tuple(p.shape) for p in linear.parameters()] == [(6, 20), (6,)]
    assert [tuple(p.shape) for p in mlp.parameters()] == [(20, 20), (20,), (6, 20), (6,)]


@pytest.mark.parametrize("size", [33, 56])
def test_gradients_do_not_depend_on_the_memory_format(size: int) -> None:
    """In channels-last, a strided 1x1 convolution with few channels once wrote outside its memory."""
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


@pytest.mark.parametrize("architecture", ["resnet18", "resnext50_32x4d"])
def test_initial_weights_are_those_of_kaiming_normal_fan_out(architecture: str) -> None:
    """Standard deviation (2 / (out channels * kernel))^0.5."""
    torch.manual_seed(0)
    encoder = ResNet(Encoder(architecture=architecture, stem="half", width=32))
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            ratio = float(module.weight.detach().std()) * (fan_out / 2) ** 0.5
            # The standard error of a standard deviation of n normal numbers is 1 / (2n)^0.5 of it.
            assert ratio == pytest.approx(1, abs=4 / (2 * module.weight.numel()) ** 0.5), name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
