"""Encoder files: safetensors with the names of `ResNet.state_dict()`, which are torchvision's.

A backbone loaded with mismatched names fails silently and lowers the scores. Here every tensor must match
by name and shape and be finite, or the file is refused.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.resnet import ResNet
from mochi.errors import UserError
from mochi.storage.atomic import replacing

_MAX_LISTED = 10


class EncoderError(UserError):
    """An encoder file that is missing, unreadable, or of another architecture."""


def save_encoder(path: Path, encoder: nn.Module) -> None:
    """Write all parameters and buffers of an encoder; equal tensors give equal files.

    Raises:
        OSError: the disk is full or the folder read-only; an existing file is as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with replacing(path) as temporary:
        # One metadata key only: the order of several differs from process to process.
        save_file(tensors, temporary, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU.

    Raises:
        EncoderError: no such file, or not safetensors.
    """
    if not path.exists():
        raise EncoderError(f"{path}: no such encoder; run the pretraining of this run first")
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"{path}: cannot be read as safetensors: {error}; expected an encoder that pretraining wrote"
        ) from None


def load_encoder(path: Path, config: Encoder, device: torch.device) -> ResNet:
    """The encoder in `path` on `device`, frozen, in evaluation mode and channels-last.

    Raises:
        EncoderError: the file cannot be read or does not fit `config`.
    """
    encoder = build(config)
    tensors = read_tensors(path)
    check_fit(path, tensors, encoder.state_dict(), config)
    encoder.load_state_dict(tensors)
    encoder.requires_grad_(requires_grad=False)
    return encoder.to(device).to(memory_format=torch.channels_last).eval()


def check_fit(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: Encoder
) -> None:
    """Compare the tensors of a file with those of an encoder of `config`.

    Raises:
        EncoderError: a tensor is missing, unknown, of another shape, or has NaN or Inf; they are listed.
    """
    lines = [
        _mismatch(name, found.get(name), expected.get(name)) for name in sorted(found.keys() | expected)
    ]
    wrong = [line for line in lines if line]
    if wrong:
        more = [f"  ... and {len(wrong) - _MAX_LISTED} more"] if len(wrong) > _MAX_LISTED else []
        raise EncoderError(
            f"{path} is not a {config.architecture} with stem {config.stem} and width {config.width}; "
            f"{len(wrong)} of {len(lines)} tensors do not fit:\n"
            + "\n".join(wrong[:_MAX_LISTED] + more)
            + "\nUse an encoder that was trained with this `encoder` section"
        )


def _mismatch(name: str, found: Tensor | None, expected: Tensor | None) -> str:
    """One line of the table, or nothing where the tensor fits."""
    if found is None or expected is None or found.shape != expected.shape:
        return f"  {name}: expected {_shape(expected)}, found {_shape(found)}"
    if found.is_floating_point() and not torch.isfinite(found).all():
        return f"  {name}: found NaN or Inf"
    return ""


def _shape(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else str(list(tensor.shape))


def digest(tensors: Mapping[str, Tensor], part: str | None = None) -> str:
    """sha256 over the names and bytes of tensors, whatever their device, order and memory format.

    Args:
        tensors: by name, such as a `state_dict()`.
        part: count only tensors below this name, such as "conv1" or "layer4".
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        if part is None or name.split(".")[0] == part:
            values = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            total.update(name.encode() + values.numpy().tobytes())
    return total.hexdigest()
