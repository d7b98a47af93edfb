"""Encoder files for code outside this project: `from mochi import load_encoder`."""

import shlex
from pathlib import Path

import torch

from mochi.config import Encoder
from mochi.config.reading import validate
from mochi.encoders import files
from mochi.encoders.backbone import Backbone
from mochi.encoders.files import EncoderError


def load_encoder(
    path: Path | str,
    *,
    architecture: str | None = None,
    stem: str | None = None,
    width: int | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """A pretrained encoder, frozen, in evaluation mode and channels-last.

    Args:
        path: encoder.safetensors, or a file written by `mochi import`.
        architecture: only for files without metadata, with `stem` and `width`, as in
            `mochi.config.Encoder`. For other files it must equal the metadata.
        stem: imagenet, half or full.
        width: channels of the first stage, 64 in torchvision's ResNets.
        device: of the encoder.

    Returns:
        (B, 3, H, W) normalised images -> (B, num_features) features.

    Raises:
        EncoderError: the file cannot be read or is not that encoder (a ValueError).
        ConfigError: there is no such architecture, stem or width (a ValueError).
    """
    path = Path(path)
    if architecture is not None:
        settings = {"architecture": architecture, "stem": stem, "width": width}
        config = validate(Encoder, settings, "load_encoder")
    elif (info := files.read_info(path)) is not None:
        config = info.config(path)
    else:
        raise EncoderError(
            f"{path}: has no metadata with the architecture; give architecture=, stem= and width=, "
            f"or convert it: mochi import {shlex.quote(str(path))} --out NEW.safetensors"
        )
    return files.load_encoder(path, config, torch.device(device))
