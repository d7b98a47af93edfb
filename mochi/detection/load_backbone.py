"""An encoder's weights into a detector, proven.

A backbone whose keys do not match and a warning in a log have cost people weeks (AP drops, nothing
fails). Here every tensor is matched by name and by value, or the run refuses.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mochi.detection.model import Detector
from mochi.errors import UserError


class InitialisationError(UserError):
    """The encoder does not fit the detector; the text is the table of what does not."""


def load_encoder(detector: Detector, path: Path) -> dict[str, dict[str, str]]:
    """Give the detector the encoder in `path` and prove that it has it.

    Returns:
        sha256 of conv1 and of layer4 (res5), of the file's and of the detector's tensors.

    Raises:
        InitialisationError: the file cannot be read, or a tensor is missing, foreign, of another shape or
            not finite; all of them are named.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InitialisationError(
            f"{path}: cannot be read as safetensors: {error}; expected an encoder that `pretrain` wrote"
        ) from None
    slots = encoder_tensors(detector)
    rows = [_compare(name, weights.get(name), slots.get(name)) for name in sorted(weights.keys() | slots)]
    wrong = [row for row in rows if row]
    if wrong:
        raise InitialisationError(
            f"{path}: does not fit the detector's encoder ({len(wrong)} of {len(slots)} tensors):\n"
            + "\n".join(wrong)
            + "\nUse the encoder of a run with the same `encoder` section, or convert it with `import`"
        )
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(weights[name])
    unequal = [
        name
        for name, slot in encoder_tensors(detector).items()
        if not torch.equal(slot.cpu(), weights[name])
    ]
    assert not unequal, f"not copied: {unequal}"
    return {
        part: {
            "encoder": checksum(weights, part),
            "detector": checksum(encoder_tensors(detector), part),
        }
        for part in ("conv1", "layer4")
    }


def encoder_tensors(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors that come from an encoder, by the encoder's names."""
    backbone = dict(detector.backbone.state_dict())
    head = {f"layer4.{name}": value for name, value in detector.heads.box_head.layer4.state_dict().items()}
    return backbone | head


def checksum(tensors: dict[str, Tensor], part: str) -> str:
    """sha256 over the names and bytes of the tensors of one part of the encoder."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        if name.split(".")[0] == part:
            total.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _compare(name: str, given: Tensor | None, wanted: Tensor | None) -> str:
    """One line of the table, or nothing where all is well."""
    if given is None:
        return f"  {name}: missing in the file"
    if wanted is None:
        return f"  {name}: not part of the detector's encoder"
    if given.shape != wanted.shape:
        return f"  {name}: shape {tuple(given.shape)} in the file, {tuple(wanted.shape)} in the detector"
    if given.is_floating_point() and not torch.isfinite(given).all():
        return f"  {name}: holds values that are not finite"
    return ""
