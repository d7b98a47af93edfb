"""Our ResNets against torchvision's: the same names, shapes, numbers of parameters and features."""

import pytest
import torch
import torchvision

from mochi.config import Encoder
from mochi.encoder import ResNet, projection_head


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
