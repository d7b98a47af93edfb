"""timm encoders: their features with this project's batch normalisation, and their files."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mochi.config import ConfigError, Encoder, parse_experiment
from mochi.encoders import build
from mochi.encoders.batch_norm import GroupedBatchNorm2d
from mochi.encoders.files import load_encoder, save_encoder
from tests.project import ROOT

timm = pytest.importorskip("timm")
CONFIG = Encoder(architecture="timm:mobilenetv3_small_050")


def test_features_equal_timms_with_every_norm_layer(tmp_path: Path) -> None:
    encoder = build(CONFIG, partial(GroupedBatchNorm2d, num_groups=2), seed=1)
    images = torch.randn(4, 3, 48, 48)
    encoder(images)  # statistics that are not the initial ones
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    loaded = load_encoder(tmp_path / "encoder.safetensors", CONFIG, torch.device("cpu"))
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    theirs.load_state_dict({k.removeprefix("model."): v for k, v in encoder.state_dict().items()})
    with torch.no_grad():
        for ours in (encoder.eval(), loaded):
            torch.testing.assert_close(ours(images), theirs(images))
    assert loaded(images).shape == (4, loaded.num_features)


def test_every_batch_norm_is_replaced_and_keeps_its_activation() -> None:
    grouped, plain = build(CONFIG, partial(GroupedBatchNorm2d, num_groups=2), seed=1), build(CONFIG, seed=1)
    kinds = {type(module) for module in grouped.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {GroupedBatchNorm2d}
    half = torch.randn(2, 3, 48, 48)
    images = torch.cat([half, half])  # each group has the statistics of the whole batch
    torch.testing.assert_close(grouped(images), plain(images), rtol=1e-3, atol=1e-3)


def test_replaced_norms_keep_the_initial_weights() -> None:
    """timm's ResNets start each block as the identity: the last weight is 0."""
    config = Encoder(architecture="timm:resnet10t")
    ours = build(config, partial(GroupedBatchNorm2d, num_groups=2), seed=1).state_dict()
    theirs = build(config, seed=1).state_dict()
    assert not theirs["model.layer1.0.bn2.weight"].any()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_an_unknown_model_and_a_detector_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"found timm:resnet51; timm .* has no such model"):
        build(Encoder(architecture="timm:resnet51"))
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    settings["encoder"] = {"architecture": "timm:resnet18"}
    with pytest.raises(ConfigError, match=r"detection.photo-scenes-frozen: found with .* timm:resnet18"):
        parse_experiment(settings, "x")
