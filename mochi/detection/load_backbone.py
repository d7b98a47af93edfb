"""Load an encoder's weights into a detector, verified by value."""

from pathlib import Path

import torch
from torch import Tensor

from mochi.config import Encoder
from mochi.detection.model import Detector
from mochi.encoders.files import digest, read_tensors


def load_backbone(detector: Detector, path: Path, config: Encoder) -> dict[str, dict[str, str]]:
    """Copy the encoder in `path` into the detector.

    Args:
        detector: built for an encoder of `config`.
        path: the encoder file.
        config: the encoder's architecture.

    Returns:
        sha256 of conv1 and of layer4 (res5), of the file's and of the detector's tensors.

    Raises:
        EncoderError: the file cannot be read, or does not fit the detector's encoder.
    """
    slots = encoder_tensors(detector)
    tensors = read_tensors(path, config, slots)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])
    loaded = encoder_tensors(detector)
    unequal = [name for name, tensor in loaded.items() if not torch.equal(tensor.cpu(), tensors[name])]
    assert not unequal, f"not copied: {unequal}"
    return {
        part: {"encoder": digest(tensors, part), "detector": digest(loaded, part)}
        for part in ("conv1", "layer4")
    }


def encoder_tensors(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors that come from an encoder, by the encoder's names."""
    backbone = dict(detector.backbone.state_dict())
    head = {f"layer4.{name}": value for name, value in detector.heads.box_head.layer4.state_dict().items()}
    return backbone | head
