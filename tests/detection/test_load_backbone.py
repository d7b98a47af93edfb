"""The encoder in the detector compared with the encoder in the file, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi import encoders
from mochi.detection.load_backbone import encoder_tensors, load_backbone
from mochi.detection.model import build
from mochi.encoders.files import EncoderError, digest
from tests.detection.sets import ENCODER, small_model


def test_every_tensor_is_loaded(encoder_file: Path) -> None:
    detector = build(ENCODER, 2, small_model())
    before = {name: value.clone() for name, value in encoder_tensors(detector).items()}
    checksums = load_backbone(detector, encoder_file, ENCODER)
    weights = load_file(encoder_file)
    assert encoder_tensors(detector).keys() == weights.keys()
    for name, value in encoder_tensors(detector).items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(before["conv1.weight"], weights["conv1.weight"])
    for part in ("conv1", "layer4"):
        assert checksums[part]["encoder"] == checksums[part]["detector"] == digest(weights, part)
    assert checksums["conv1"] != checksums["layer4"]


def test_the_detector_computes_the_encoders_features(encoder_file: Path) -> None:
    detector, encoder = build(ENCODER, 2, small_model()).eval(), encoders.build(ENCODER).eval()
    load_backbone(detector, encoder_file, ENCODER)
    encoder.load_state_dict(load_file(encoder_file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = detector.heads.box_head.layer4(detector.backbone(images)).mean((2, 3))
        torch.testing.assert_close(ours, encoder(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "layer4" not in k}, "layer4.0.bn1.bias: expected"),
        (lambda w: {**w, "conv1.weight": torch.zeros(4, 3, 7, 7)}, r"found \[4, 3, 7, 7\]"),
    ],
    ids=["no res5", "another stem"],
)
def test_an_encoder_that_does_not_match_changes_nothing(
    encoder_file: Path, change: object, message: str
) -> None:
    assert callable(change)
    save_file(change(load_file(encoder_file)), encoder_file)
    detector = build(ENCODER, 2, small_model())
    before = digest(detector.state_dict())
    with pytest.raises(EncoderError, match=message):
        load_backbone(detector, encoder_file, ENCODER)
    assert digest(detector.state_dict()) == before
