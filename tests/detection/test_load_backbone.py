"""The encoder in the detector against the encoder in the file, tensor by tensor; what does not fit is
refused with its name, where elsewhere a warning stands in a log."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi.config import Encoder
from mochi.detection.load_backbone import InitialisationError, checksum, encoder_tensors, load_encoder
from mochi.detection.model import build
from mochi.encoders.resnet import ResNet
from tests.detection.conftest import ENCODER, small_model


def test_every_tensor_arrives(encoder_file: Path) -> None:
    detector = build(ENCODER, 2, small_model())
    before = {name: value.clone() for name, value in encoder_tensors(detector).items()}
    proof = load_encoder(detector, encoder_file)
    weights = load_file(encoder_file)
    assert encoder_tensors(detector).keys() == weights.keys()
    for name, value in encoder_tensors(detector).items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(before["conv1.weight"], weights["conv1.weight"])
    for part in ("conv1", "layer4"):
        assert proof[part]["encoder"] == proof[part]["detector"] == checksum(weights, part)
    assert proof["conv1"] != proof["layer4"]


def test_the_detector_computes_the_encoders_features(encoder_file: Path) -> None:
    detector, encoder = build(ENCODER, 2, small_model()).eval(), ResNet(ENCODER).eval()
    load_encoder(detector, encoder_file)
    encoder.load_state_dict(load_file(encoder_file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = detector.heads.box_head.layer4(detector.backbone(images)).mean((2, 3))
        torch.testing.assert_close(ours, encoder(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k.replace("layer2.0.conv1", "layer2.0.cnv1"): v for k, v in w.items()},
         "layer2.0.cnv1.weight: not part .*\n.*layer2.0.conv1.weight: missing in the file"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "module.bn1.bias: not part"),
        (lambda w: {k: v for k, v in w.items() if "layer4" not in k}, "layer4.0.bn1.bias: missing"),
        (lambda w: {**w, "fc.weight": torch.zeros(2, 2)}, "fc.weight: not part"),
        (lambda w: {**w, "conv1.weight": torch.zeros(4, 3, 7, 7)}, r"conv1.weight: shape \(4, 3, 7, 7\)"),
        (lambda w: {**w, "bn1.bias": torch.full((4,), float("nan"))}, "bn1.bias: .* not finite"),
    ],
    ids=["misspelt", "prefixed", "no res5", "classifier", "another stem", "nan"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(encoder_file: Path, change: object, message: str) -> None:
    assert callable(change)
    save_file(change(load_file(encoder_file)), encoder_file)
    with pytest.raises(InitialisationError, match=message):
        load_encoder(build(ENCODER, 2, small_model()), encoder_file)


def test_no_file_and_no_safetensors_are_said(tmp_path: Path) -> None:
    detector = build(Encoder(architecture="resnet10", stem="half", width=4), 2, small_model())
    with pytest.raises(InitialisationError, match="cannot be read as safetensors"):
        load_encoder(detector, tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"pickle")
    with pytest.raises(InitialisationError, match="cannot be read as safetensors"):
        load_encoder(detector, tmp_path / "x.safetensors")
