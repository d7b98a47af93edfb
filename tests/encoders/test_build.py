"""`build`: the seed decides the weights and does not change other generators."""

import torch
from torch import nn

from mochi import encoders
from mochi.config import Encoder
from mochi.encoders.files import digest
from mochi.encoders.heads import projection_head
from mochi.encoders.resnet import ResNet

CONFIG = Encoder(architecture="resnet10", stem="half", width=4)


def test_the_seed_decides_the_weights() -> None:
    one, again, other = (digest(encoders.build(CONFIG, seed=seed).state_dict()) for seed in (1, 1, 2))
    assert one == again != other


def test_an_untrained_encoder_has_the_initial_weights_of_its_seed() -> None:
    torch.manual_seed(3)
    expected = digest(ResNet(CONFIG).state_dict())
    assert digest(encoders.build_untrained(CONFIG, seed=3).state_dict()) == expected


def test_building_does_not_change_torchs_generator() -> None:
    before = torch.get_rng_state()
    encoders.build(CONFIG, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_norm_layer_is_the_one_given() -> None:
    encoder = encoders.build(CONFIG, norm_layer=nn.InstanceNorm2d)
    kinds = {type(module) for module in encoder.modules() if "Norm" in type(module).__name__}
    assert kinds == {nn.InstanceNorm2d}


def test_a_linear_head_has_one_layer_and_an_mlp_head_two() -> None:
    layers = {
        kind: [type(layer).__name__ for layer in projection_head(8, 4, kind)] for kind in ("linear", "mlp")
    }
    assert layers == {"linear": ["Linear"], "mlp": ["Linear", "ReLU", "Linear"]}
