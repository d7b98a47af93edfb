"""Encoder files: safetensors with the names of the encoder's `state_dict()` and metadata.

A backbone loaded with mismatched names, or fed with pixels it was not trained on, fails silently and
lowers the scores. Here every tensor must match by name and shape and be finite, the metadata must be
those of the requested encoder, and its normalisation must be this project's; otherwise the file is refused.
"""

import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.backbone import Backbone
from mochi.errors import UserError
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.storage.atomic import replacing

logger = logging.getLogger(__name__)

METADATA_KEY = "mochi"
"""The only key of the metadata; its value is an `EncoderInfo` as JSON.

There is one key because safetensors writes several in an order that differs between processes.
"""

_MAX_LISTED = 10
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_LFS = b"version https://git-lfs"


class EncoderError(UserError):
    """An encoder file that is missing, unreadable, or not the requested encoder."""


class EncoderInfo(BaseModel):
    """The metadata of an encoder file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    architecture: str
    stem: str | None
    width: int | None
    image_size: PositiveInt | None = None
    """Side of the images in training, pixels; None: unknown."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, in `channel_order`, for pixels in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    channel_order: Literal["RGB", "BGR"] = "RGB"
    method: str | None = None
    """Row of the experiment, or the kind of checkpoint it was imported from."""
    experiment: str | None = None
    seed: int | None = None
    settings_digest: str | None = None
    """Settings digest of the run that trained it, as in its provenance.json."""
    code_digest: str | None = None
    source: str | None = None
    """Name and sha256 of the file it was imported from."""

    @classmethod
    def of(cls, config: Encoder, **about: object) -> Self:
        """The metadata of an encoder of `config`; `about` are further fields."""
        return cls.model_validate({**config.model_dump(), **about})

    def config(self, path: Path) -> Encoder:
        """The architecture.

        Raises:
            EncoderError: there is no such architecture; the message names `path`.
        """
        try:
            return Encoder.model_validate(
                {"architecture": self.architecture, "stem": self.stem, "width": self.width}
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise EncoderError(f"{path}: its metadata names an unknown encoder: {reason}") from None


class EncoderFile(NamedTuple):
    """The content of an encoder file."""

    info: EncoderInfo | None
    """None in older files, which have no metadata."""
    tensors: dict[str, Tensor]


def save_encoder(path: Path, encoder: Backbone, info: EncoderInfo | None = None) -> None:
    """Write all parameters and buffers of an encoder; equal tensors and info give equal files.

    Args:
        path: the file.
        encoder: what to write.
        info: the metadata; None: the architecture and this project's normalisation.

    Raises:
        OSError: the disk is full or the folder read-only; an existing file is unchanged.
    """
    write_tensors(path, encoder.state_dict(), info or EncoderInfo.of(encoder.config))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: EncoderInfo | None) -> None:
    """Write the tensors of an encoder, or, without `info`, other tensors; see `save_encoder`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: info.model_dump_json()} if info else {"format": "pt"}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_info(path: Path) -> EncoderInfo | None:
    """The metadata only; see `read_encoder`."""
    return _read(path, tensors=False).info


def read_encoder(path: Path) -> EncoderFile:
    """Metadata and tensors, on the CPU.

    Raises:
        EncoderError: no such file, not safetensors, or metadata that cannot be read.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> EncoderFile:
    if not path.exists():
        raise EncoderError(f"{path}: no such encoder; run the pretraining first, or `mochi import`")
    require_content(path, "expected an encoder that pretraining wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"{path}: cannot be read as safetensors: {error}; expected an encoder that pretraining wrote; "
            "`mochi import` converts other checkpoints"
        ) from None
    return EncoderFile(_info(path, metadata), found)


def require_content(path: Path, expected: str) -> None:
    """Refuse what is not a file of tensors, or only stands for it.

    Raises:
        EncoderError: a folder, a pipe, an empty file or a pointer of Git LFS; `expected` ends the message.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device, not a regular file"
        raise EncoderError(f"{path}: is {kind}; {expected}")
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise EncoderError(f"{path}: is empty (0 bytes); download or copy it again")
    if start == _LFS:
        raise EncoderError(f"{path}: is a pointer of Git LFS, not the file; run `git lfs pull`")


def _info(path: Path, metadata: Mapping[str, str]) -> EncoderInfo | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        return EncoderInfo.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "the whole"
        raise EncoderError(
            f"{path}: its metadata cannot be read: {where}: {wrong['msg']}; expected what pretraining or "
            "`mochi import` writes"
        ) from None


def read_tensors(path: Path, config: Encoder, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> tensor of the file of an encoder of `config`, on the CPU; every reader goes through here.

    Args:
        path: the file.
        config: the requested architecture.
        expected: its tensors, by name.

    Raises:
        EncoderError: the file cannot be read, its tensors do not fit, or its metadata name another
            encoder or a different normalisation of pixels.
    """
    info, tensors = read_encoder(path)
    if info is not None and (found := info.config(path)) != config:
        raise EncoderError(
            f"{path} is not a {config}: its metadata says {found}; set the section `encoder` to that, or "
            "use an encoder of this section"
        )
    check_fit(path, tensors, expected, config)
    if info is None:
        logger.warning(
            "%s: has no metadata: assuming RGB images with ImageNet's mean and standard "
            "deviation; `mochi import` writes a file with metadata",
            path,
        )
        return tensors
    check_pixels(path, info)
    logger.info("%s: %s, method %s, experiment %s", path, config, info.method, info.experiment)
    return tensors


def check_pixels(path: Path, info: EncoderInfo) -> None:
    """Check that an encoder was trained on pixels normalised as in this project.

    Raises:
        EncoderError: the channel order, mean or standard deviation differs.
    """
    found = (info.channel_order, info.mean, info.std)
    if found != (expected := ("RGB", IMAGENET_MEAN, IMAGENET_STD)):
        raise EncoderError(
            f"{path}: trained on {_pixels(*found)}; images here are {_pixels(*expected)}; convert it: "
            f"mochi import {shlex.quote(str(path))} --out NEW.safetensors"
        )


def _pixels(order: str, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    return f"{order} with mean {list(mean)} and standard deviation {list(std)}"


def load_encoder(path: Path, config: Encoder, device: torch.device) -> Backbone:
    """The encoder in `path` on `device`, frozen, in evaluation mode and channels-last.

    Raises:
        EncoderError: the file cannot be read or is not an encoder of `config`.
    """
    encoder = build(config)
    encoder.load_state_dict(read_tensors(path, config, encoder.state_dict()))
    encoder.requires_grad_(requires_grad=False)
    return encoder.to(device).to(memory_format=torch.channels_last).eval()


def check_fit(
    path: Path,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: Encoder,
    advice: str = "Use an encoder that was trained with this `encoder` section",
) -> None:
    """Compare the tensors of a file with those of an encoder of `config`; `advice` ends the message.

    Raises:
        EncoderError: a tensor is missing, unknown, of another shape or type, or has NaN, Inf, a
            negative variance or a convolution of zeros only; the message lists them.
    """
    lines = [
        _mismatch(name, found.get(name), expected.get(name)) for name in sorted(found.keys() | expected)
    ]
    wrong = [line for line in lines if line]
    if wrong:
        more = [f"  ... and {len(wrong) - _MAX_LISTED} more"] if len(wrong) > _MAX_LISTED else []
        raise EncoderError(
            f"{path} is not a {config}; "
            f"{len(wrong)} of {len(lines)} tensors do not fit:\n"
            + "\n".join(wrong[:_MAX_LISTED] + more)
            + f"\n{advice}"
        )


def _mismatch(name: str, found: Tensor | None, expected: Tensor | None) -> str:
    """One line of the table; none if the tensor fits."""
    if found is None or expected is None or found.shape != expected.shape:
        return f"  {name}: expected {_shape(expected)}, found {_shape(found)}"
    if expected.is_floating_point() and found.dtype not in _FLOATS:
        return f"  {name}: expected floating-point numbers, found {found.dtype}"
    if found.dtype in _FLOATS and not torch.isfinite(found).all():
        return f"  {name}: found NaN or Inf"
    if found.ndim == 4 and name.endswith("weight") and not found.any():
        return f"  {name}: found zeros only, as after an interrupted download"
    if name.endswith("running_var") and (found < 0).any():
        return f"  {name}: found a variance below 0"
    return ""


def _shape(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else str(list(tensor.shape))


def require_new_file(path: Path, out: Path) -> None:
    """Refuse to write over the file that is read.

    Raises:
        EncoderError: `out` is `path`.
    """
    if path.exists() and out.exists() and out.samefile(path):
        raise EncoderError(f"--out: found {out}, the file that is read; give another name")


def require_suffix(out: Path, suffixes: Sequence[str]) -> None:
    """Refuse a name that other formats have. A name without a suffix is accepted.

    Raises:
        EncoderError: the suffix of `out` is another one.
    """
    if out.suffix and out.suffix.lower() not in suffixes:
        raise EncoderError(
            f"--out: found {out}; expected a name that ends in {' or '.join(suffixes)}, "
            "the format that is written"
        )


def digest(tensors: Mapping[str, Tensor], part: str | None = None) -> str:
    """sha256 over the names and bytes of tensors, whatever their device, order and memory format.

    Args:
        tensors: by name, such as a `state_dict()`.
        part: include only tensors below this name, such as "conv1" or "layer4".
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        if part is None or name.split(".")[0] == part:
            values = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            total.update(name.encode() + values.numpy().tobytes())
    return total.hexdigest()
