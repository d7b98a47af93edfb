"""An encoder file with the preprocessing from its metadata."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mochi.config import Encoder, load_experiment
from mochi.config.reading import validate
from mochi.data.ingest.decode import MAX_PIXELS
from mochi.data.views.crops import centre_image
from mochi.encoders import build
from mochi.encoders.backbone import Backbone
from mochi.encoders.files import EncoderError, EncoderInfo, check_fit, read_encoder
from mochi.errors import UserError
from mochi.evaluation.features import encode


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the encoder's input."""

    image_size: int
    """Side of the central square, pixels."""
    resize: int
    """Short side of the image before the square is cut out, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Standard deviation of each channel, as `mean` in `channel_order` and for pixels in [0, 1]."""
    channel_order: str

    def cut(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 RGB -> (3, S, S) uint8: short side to `resize`, then the central square."""
        return centre_image(image, self.resize, self.image_size)

    def normalize(self, crops: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 RGB -> float32 as the encoder was trained on, channels last."""
        crops = crops.flip(1) if self.channel_order == "BGR" else crops
        mean, std = (
            torch.tensor(each, device=crops.device)[:, None, None] for each in (self.mean, self.std)
        )
        return crops.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder in evaluation mode, on a device."""

    backbone: Backbone
    preprocessing: Preprocessing
    device: torch.device

    def encode(self, crops: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 from `Preprocessing.cut` -> (B, D) float32 on the CPU."""
        return encode(self.backbone, self.preprocessing.normalize(crops.to(self.device))).cpu()


@dataclass(frozen=True)
class Overrides:
    """The user's choices, which override the metadata."""

    config: Path | None = None
    """Experiment file: its encoder, and the sizes of its evaluation."""
    architecture: str | None = None
    stem: str | None = None
    width: int | None = None
    image_size: int | None = None
    resize: int | None = None


def load(path: Path, overrides: Overrides, device: torch.device) -> LoadedEncoder:
    """Read an encoder file.

    Raises:
        EncoderError: it does not exist, is unreadable, or neither its metadata nor the user give the
            architecture.
        UserError: sizes that contradict each other.
    """
    file = read_encoder(path)
    config, size, resize = _described(path, file.info, overrides)
    if resize < size:
        raise UserError(f"--resize: found {resize}; expected at least the image size, {size}")
    if resize**2 > MAX_PIXELS:
        raise UserError(f"--resize: found {resize}; expected at most {MAX_PIXELS} pixels in its square")
    backbone = build(config)
    check_fit(path, file.tensors, backbone.state_dict(), config)
    backbone.load_state_dict(file.tensors)
    backbone.requires_grad_(requires_grad=False)
    backbone = backbone.to(device).to(memory_format=torch.channels_last).eval()
    info = file.info or EncoderInfo.of(config)
    return LoadedEncoder(
        backbone, Preprocessing(size, resize, info.mean, info.std, info.channel_order), device
    )


def _described(path: Path, info: EncoderInfo | None, overrides: Overrides) -> tuple[Encoder, int, int]:
    """Architecture, image size and resize: from `--config`, else from the flags, else from the metadata.

    `--image-size` and `--resize` have precedence over all of these.
    """
    size, resize = overrides.image_size, overrides.resize
    if overrides.config is not None:
        experiment = load_experiment(overrides.config)
        config = experiment.encoder
        size, resize = size or experiment.evaluation.image_size, resize or experiment.evaluation.resize
    elif overrides.architecture is not None:
        settings = {name: getattr(overrides, name) for name in ("architecture", "stem", "width")}
        config = validate(Encoder, settings, "flags")
    elif info is not None:
        config = info.config(path)
    else:
        raise EncoderError(
            f"{path}: has no metadata (it was written by an older version); give "
            "--config FILE of its experiment, or --architecture, --stem, --width and --image-size"
        )
    size = size or (info.image_size if info else None)
    if size is None:
        raise EncoderError(f"{path}: its metadata has no image size; give --image-size")
    # 8/7 of the crop as on ImageNet; small images are used whole, as on CIFAR.
    return config, size, resize or (round(size * 8 / 7) if size >= 64 else size)
