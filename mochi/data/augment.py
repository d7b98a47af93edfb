"""The photometric part of MoCo's augmentations (versions 1 and 2), a batch at a time on any device.

Random parameters are drawn on the CPU as arrays, one row an image (`draws`), and the operations are
plain functions of images and parameters: each equals torchvision's functional one, image by image.
Images are (B, 3, H, W) float32 in [0, 1]. Legend: B images, S side
of a view.

Source: facebookresearch/moco main_moco.py; torchvision.transforms.ColorJitter.
Deviation: no rounding to 8 bits between operations; the blur is the Gaussian that PIL's three box
passes approximate, with torchvision's reflected border instead of PIL's repeated one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mochi.config import Augmentation
from mochi.data import draws
from mochi.data.crops import parts

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_GREY = (0.2989, 0.587, 0.114)  # torchvision's weights
_BLUR_RADIUS = 6  # three standard deviations of the widest blur

# The columns of one row of draws. New ones go to the end: earlier draws keep their values.
_ORDER, _FACTORS = slice(0, 4), slice(4, 8)
_JITTER, _GREYSCALE, _BLUR, _SIGMA, _COLUMNS = 8, 9, 10, 11, 12


@dataclass(frozen=True)
class Parameters:
    """What happens to each image of a batch; every field has B rows."""

    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]  # (B, 4): a permutation of brightness, contrast, saturation, hue
    factors: NDArray[np.float64]  # (B, 4): by operation, not by position
    grey: NDArray[np.bool_]
    sigma: NDArray[np.float64]  # 0: no blur


def draw(
    augmentation: Augmentation, indices: NDArray[np.int64], *, seed: int, epoch: int, view: int
) -> Parameters:
    """Parameters of one view (0 query, 1 key) of the images `indices`."""
    u = draws.uniforms("photometric", seed, epoch, view, indices=indices, columns=_COLUMNS)
    version2 = augmentation.version == "v2"
    hue = 0.1 if version2 else 0.4
    factors = 1 + 0.4 * (2 * u[:, _FACTORS] - 1)
    factors[:, 3] = hue * (2 * u[:, _FACTORS][:, 3] - 1)
    blurred = (u[:, _BLUR] < 0.5) & (version2 and augmentation.blur)
    return Parameters(
        jitter=u[:, _JITTER] < (0.8 if version2 else 1.0),
        order=np.argsort(u[:, _ORDER], axis=1, kind="stable"),
        factors=factors,
        grey=u[:, _GREYSCALE] < 0.2,
        sigma=np.where(blurred, 0.1 + 1.9 * u[:, _SIGMA], 0.0),
    )


def photometric(images: Tensor, parameters: Parameters, version: str) -> Tensor:
    """Everything after crop and flip, in the order of the version; normalised, channels last.

    v1: greyscale, colour jitter. v2: colour jitter, greyscale, blur. (A mirrored image commutes with
    all of them, so the flip is done with the crop.)

    Args:
        images: (B, 3, S, S), float32 in [0, 1], which are overwritten, or uint8.
    """
    output = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    for rows in parts(len(images), images[0].numel(), images.device):
        part = _unit(images[rows])
        if version == "v1":
            greyscale_(part, parameters.grey[rows])
        jitter_(part, parameters.jitter[rows], parameters.order[rows], parameters.factors[rows])
        if version == "v2":
            greyscale_(part, parameters.grey[rows])
            blur_(part, parameters.sigma[rows])
        output[rows] = _normalized_(part)
    return output


def normalize(images: Tensor) -> Tensor:
    """(B, 3, S, S), in [0, 1] or uint8 -> ImageNet mean 0 and deviation 1, channels last."""
    output = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    for rows in parts(len(images), images[0].numel(), images.device):
        output[rows] = _normalized_(_unit(images[rows]))
    return output


def _unit(images: Tensor) -> Tensor:
    """float32 in [0, 1], contiguous; float images as they are."""
    if images.dtype != torch.uint8:
        return images
    return (
        torch.empty_like(images, dtype=torch.float32, memory_format=torch.contiguous_format)
        .copy_(images)
        .div_(255)
    )


def _normalized_(images: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    return images.sub_(mean).div_(std)


def grey_of(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    grey = images[:, 0:1] * _GREY[0]
    return grey.add_(images[:, 1:2], alpha=_GREY[1]).add_(images[:, 2:3], alpha=_GREY[2])


def greyscale_(images: Tensor, chosen: NDArray[np.bool_]) -> None:
    """Make the chosen (B,) images grey, in place."""
    _on_chosen_(images, chosen, lambda some: grey_of(some).expand(-1, 3, -1, -1))


def jitter_(
    images: Tensor, chosen: NDArray[np.bool_], order: NDArray[np.int64], factors: NDArray[np.float64]
) -> None:
    """ColorJitter of the chosen images, each with its own order of the four operations, in place.

    Brightness, contrast and saturation are one formula, clamp(f x + (1 - f) anchor), whose anchor is
    black, the mean grey, or the pixel's grey.
    """
    for position in range(4):
        operation = np.where(chosen, order[:, position], -1)  # (B,)
        blended = (operation >= 0) & (operation < 3)
        if blended.any():
            f = np.where(blended, factors[np.arange(len(operation)), order[:, position]], 1.0)
            by_mean = np.where(operation == 1, 1 - f, 0.0)
            by_grey = np.where(operation == 2, 1 - f, 0.0)
            scalars = torch.from_numpy(np.stack([f, by_mean, by_grey]).astype(np.float32))
            gain, mean_gain, grey_gain = scalars.to(images.device)[:, :, None, None, None]  # (B, 1, 1, 1)
            if by_mean.any() or by_grey.any():
                grey = grey_of(images)
                mean = grey.mean(dim=(2, 3), keepdim=True)
                images.mul_(gain).add_(grey.mul_(grey_gain).add_(mean * mean_gain)).clamp_(0, 1)
            else:
                images.mul_(gain).clamp_(0, 1)
        turned = operation == 3
        _on_chosen_(images, turned, partial(rotate_hue, turns=factors[turned, 3]))


def rotate_hue(images: Tensor, turns: NDArray[np.float64]) -> Tensor:
    """Turn the hue of each image by `turns` (B,) of the whole circle, value and saturation kept.

    HSV without S and V: with m the smallest channel and d the spread of the channels, a channel of hue h
    (in sixths of the circle) is m + d c, where c = clamp(|h - 3| - 1, 0, 1) for red and
    clamp(2 - |h - 2|, 0, 1), clamp(2 - |h - 4|, 0, 1) for green and blue.
    """
    red, green, blue = images.tensor_split(3, dim=1)  # (B, 1, H, W)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = largest - smallest
    per_spread = spread.clamp(min=1e-8).reciprocal_()
    hue = torch.where(
        red == largest,
        (green - blue).mul_(per_spread),
        torch.where(
            green == largest,
            (blue - red).mul_(per_spread).add_(2),
            (red - green).mul_(per_spread).add_(4),
        ),
    )
    hue += torch.from_numpy((6 * turns).astype(np.float32)).to(images.device)[:, None, None, None]
    hue -= (hue / 6).floor_().mul_(6)
    output = torch.empty_like(images)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(smallest, spread, share, out=output[:, channel : channel + 1])
    return output


def blur_(images: Tensor, sigma: NDArray[np.float64]) -> None:
    """Gaussian blur of the images whose sigma is above 0, in place, border reflected.

    13 taps, as torchvision's kernel_size=13; one direction after the other, two taps at a time.
    """
    deviations = torch.from_numpy(sigma[sigma > 0].astype(np.float32)).to(images.device)
    _on_chosen_(images, sigma > 0, lambda some: _blurred(_blurred(some, deviations, 2), deviations, 3))


def _blurred(images: Tensor, sigma: Tensor, axis: int) -> Tensor:
    """(B, 3, H, W) blurred along one axis."""
    side = images.shape[axis]
    radius = min(_BLUR_RADIUS, side - 1)
    distance = torch.arange(radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, taps)
    kernel = (kernel / (kernel[:, :1] + 2 * kernel[:, 1:].sum(1, keepdim=True))).T[:, :, None, None, None]
    padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
    padded = F.pad(images, padding, mode="reflect")
    output = images * kernel[0]
    for tap in range(1, radius + 1):
        before = padded.narrow(axis, radius - tap, side)
        after = padded.narrow(axis, radius + tap, side)
        output.addcmul_(before + after, kernel[tap])
    return output


def _on_chosen_(images: Tensor, chosen: NDArray[np.bool_], operation: Callable[[Tensor], Tensor]) -> None:
    """Replace the chosen (B,) images by what `operation` makes of them.

    The choice is known on the host, so nothing waits for the device.
    """
    if chosen.all():
        images.copy_(operation(images))
    elif chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
        images[rows] = operation(images[rows])
