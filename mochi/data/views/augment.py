"""The photometric part of MoCo's augmentations (versions 1 and 2), a batch at a time on any device.

Random parameters are arrays on the CPU with one row per image (`counter_rng`), and the operations are
plain functions of images and a plan derived from them: each equals torchvision's functional version for
each image. Images are (B, 3, H, W) float32 in [0, 1]. Shapes: B images, S side of a view.

Source: facebookresearch/moco main_moco.py; torchvision.transforms.ColorJitter.
Deviation: no rounding to 8 bits between operations; the blur is the Gaussian that PIL's three box
passes approximate, with torchvision's reflected border instead of PIL's repeated one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mochi.config import Augmentation
from mochi.data.views import counter_rng
from mochi.data.views.crops import chunks
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.runtime.precision import any_order
from mochi.runtime.transfer import arrays_to, to_device

_GREY = (0.2989, 0.587, 0.114)  # torchvision's weights
_BLUR_RADIUS = 6  # three standard deviations of the widest blur
_BLUR_REACH = 3.5  # taps beyond this many standard deviations are omitted

# The columns of a row of random numbers. New ones go to the end, so that the others keep their values.
_ORDER, _FACTORS = slice(0, 4), slice(4, 8)
_JITTER, _GREYSCALE, _BLUR, _SIGMA, _COLUMNS = 8, 9, 10, 11, 12


@dataclass(frozen=True)
class PhotometricParameters:
    """Operations on each image of a batch; every field has B rows."""

    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]  # (B, 4): a permutation of brightness, contrast, saturation, hue
    factors: NDArray[np.float64]  # (B, 4): by operation, not by position
    grey: NDArray[np.bool_]
    sigma: NDArray[np.float64]  # 0: no blur

    @cached_property
    def operation(self) -> NDArray[np.int64]:
        """(B, 4): the operation at each position, -1 for none."""
        return np.where(self.jitter[:, None], self.order, -1)

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """(3, B, 4), by position: f; 1 - f of a contrast; 1 - f of a saturation (see `jitter_`)."""
        f = np.take_along_axis(self.factors, self.order, axis=1)
        blended = (self.operation >= 0) & (self.operation < 3)
        anchored = [np.where(self.operation == number, 1 - f, 0) for number in (1, 2)]
        return np.stack([np.where(blended, f, 1), *anchored]).astype(np.float32)

    @cached_property
    def hues(self) -> NDArray[np.float32]:
        """(B, 3) in [-3, 3): hues of red, green and blue, in sixths of the circle, after rotation."""
        return ((np.array([0, 2, 4]) - 6 * self.factors[:, 3:] + 3) % 6 - 3).astype(np.float32)


class Plan(NamedTuple):
    """The parameters in the form that the operations need, on the device of the images.

    The number of rows of each operation is known on the host, so nothing waits for the device.
    """

    grey: Tensor  # (n,) rows that become grey
    kinds: list[set[int]]  # by position: the operations that some image has there
    gains: Tensor  # (3, B, 4)
    rotated: list[Tensor]  # by position: (n,) rows whose hue is rotated
    hues: list[Tensor]  # by position: (n, 3) of those rows
    blurred: Tensor  # (n,) rows
    kernels: Tensor  # (taps, n) weights of the centre and of the taps on one side of it


def draw(
    augmentation: Augmentation, indices: NDArray[np.int64], *, seed: int, epoch: int, view: int
) -> PhotometricParameters:
    """Parameters of one view (0 query, 1 key) of the images `indices`."""
    u = counter_rng.uniforms("photometric", seed, epoch, view, indices=indices, columns=_COLUMNS)
    version2 = augmentation.version == "v2"
    hue = 0.1 if version2 else 0.4
    factors = 1 + 0.4 * (2 * u[:, _FACTORS] - 1)
    factors[:, 3] = hue * (2 * u[:, _FACTORS][:, 3] - 1)
    blurred = (u[:, _BLUR] < 0.5) & (version2 and augmentation.blur)
    return PhotometricParameters(
        jitter=u[:, _JITTER] < (0.8 if version2 else 1.0),
        order=np.argsort(u[:, _ORDER], axis=1, kind="stable"),
        factors=factors,
        grey=u[:, _GREYSCALE] < 0.2,
        sigma=np.where(blurred, 0.1 + 1.9 * u[:, _SIGMA], 0.0),
    )


def photometric(
    images: Tensor, parameters: PhotometricParameters, version: str, output: Tensor | None = None
) -> Tensor:
    """Everything after crop and flip, in the order of the version; normalised.

    v1: greyscale, colour jitter. v2: colour jitter, greyscale, blur. (Mirroring commutes with all of
    them, so the flip is done with the crop.)

    Args:
        images: (B, 3, S, S), float32 in [0, 1], which are overwritten, or uint8.
        output: (B, 3, S, S) float32, filled and returned; channels last when made here.
    """
    output = _channels_last(images) if output is None else output
    for rows in chunks(len(images), images[0].numel(), images.device):
        part = _to_float(images[rows])
        plan = make_plan(parameters, rows, part)
        if version == "v1":
            greyscale_(part, plan)
        jitter_(part, plan)
        if version == "v2":
            greyscale_(part, plan)
            blur_(part, plan)
        _normalize_into(output[rows], part)
    return output


def make_plan(parameters: PhotometricParameters, rows: slice, images: Tensor) -> Plan:
    """Plan for `images` (B, 3, H, W), which are `rows` of the batch; transferred in one copy."""
    operation = parameters.operation[rows]
    rotated = [np.flatnonzero(operation[:, position] == 3) for position in range(4)]
    hues = parameters.hues[rows]
    sigma = parameters.sigma[rows]
    blurred = np.flatnonzero(sigma)
    radius = min(_BLUR_RADIUS, *(side - 1 for side in images.shape[2:]))
    sent = arrays_to(
        images.device,
        np.flatnonzero(parameters.grey[rows]),
        parameters.gains[:, rows],
        *rotated,
        *(hues[some] for some in rotated),
        blurred,
        _half_gaussians(sigma[blurred], radius) if len(blurred) else np.empty((0, 0), np.float32),
    )
    return Plan(
        grey=sent[0],
        kinds=[set(column) for column in operation.T.tolist()],
        gains=sent[1],
        rotated=sent[2:6],
        hues=sent[6:10],
        blurred=sent[10],
        kernels=sent[11],
    )


def normalize(images: Tensor, output: Tensor | None = None) -> Tensor:
    """Normalise to ImageNet mean 0 and standard deviation 1; arguments as in `photometric`."""
    output = _channels_last(images) if output is None else output
    for rows in chunks(len(images), images[0].numel(), images.device):
        _normalize_into(output[rows], _to_float(images[rows]))
    return output


def _channels_last(images: Tensor) -> Tensor:
    return torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)


def _to_float(images: Tensor) -> Tensor:
    """float32 in [0, 1]; float images are unchanged."""
    return images / 255 if images.dtype == torch.uint8 else images


def _normalize_into(output: Tensor, images: Tensor) -> None:
    """`output` <- (images - mean) / std; `images` are overwritten."""
    gain, shift = _constants(images.device)
    if images.device.type == "cpu":
        # Changing the memory format in a copy is faster there than in arithmetic.
        output.copy_(images.mul_(gain).add_(shift))
    else:
        torch.addcmul(shift, images, gain, out=output)


@cache
def _constants(device: torch.device) -> Tensor:
    """(2, 3, 1, 1): 1 / std and -mean / std of ImageNet's channels."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return to_device(torch.stack((1 / std, -mean / std)), device)[:, :, None, None]


def grey_of(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    grey = images[:, 0:1] * _GREY[0]
    return grey.add_(images[:, 1:2], alpha=_GREY[1]).add_(images[:, 2:3], alpha=_GREY[2])


def greyscale_(images: Tensor, plan: Plan) -> None:
    """Make the planned images grey, in place."""
    _on_rows_(images, plan.grey, lambda some: some.copy_(grey_of(some).expand_as(some)))


def jitter_(images: Tensor, plan: Plan) -> None:
    """ColorJitter of the planned images, each with its own order of the four operations, in place.

    Brightness, contrast and saturation are one formula, clamp(f x + (1 - f) anchor), whose anchor is
    black, the mean grey, or the pixel's grey.
    """
    gain, by_mean, by_grey = plan.gains
    for position, kinds in enumerate(plan.kinds):
        here = (slice(None), position, None, None, None)  # (B, 1, 1, 1)
        if kinds & {0, 1, 2}:
            grey = grey_of(images) if kinds & {1, 2} else images[:, 0:1]
            images.mul_(gain[here])
            if 1 in kinds:
                images.add_(grey.mean(dim=(2, 3), keepdim=True).mul_(by_mean[here]))
            if 2 in kinds:
                images.addcmul_(grey, by_grey[here])
            images.clamp_(0, 1)
        if 3 in kinds:
            _on_rows_(images, plan.rotated[position], partial(rotate_hue_, hues=plan.hues[position]))


def rotate_hue_(images: Tensor, hues: Tensor) -> None:
    """Rotate the hue of each image, in place; value and saturation are unchanged.

    HSV without S and V. With m the smallest channel, d the chroma (the range of the channels) and hues in
    sixths of the circle, a colour's hue is h = ±(1 + (g + b - r - m) / d), positive where green is above
    blue; and a colour of hue h has in the channel whose own hue is c (red 0, green 2, blue 4) the value
    m + d (clamp(||h - c| - 3|, 1, 2) - 1), for h - c in [-6, 6]. This needs no choice of formula per pixel,
    which takes twice as long; and rotating a colour one way is rotating the three channels the other way.

    Args:
        images: (B, 3, H, W).
        hues: (B, 3) the channels' hues after rotation (`PhotometricParameters.hues`).
    """
    red, green, blue = images.tensor_split(3, dim=1)  # (B, 1, H, W)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(smallest)
    hue = (green + blue).sub_(red).sub_(smallest).div_(chroma.clamp(min=1e-8)).add_(1)
    hue.copysign_(green - blue)  # [-3, 3]
    torch.sub(hue, hues[:, :, None, None], out=images)
    images.abs_().sub_(3).abs_().clamp_(1, 2)
    images.mul_(chroma).add_(smallest.sub_(chroma))


def blur_(images: Tensor, plan: Plan) -> None:
    """Gaussian blur of the planned images, in place, border reflected.

    13 taps, as torchvision's kernel_size=13, without those beyond 3.5 standard deviations, whose total
    weight is an eighth of an 8-bit level.
    """

    def along_both_(some: Tensor) -> None:
        for axis in (2, 3):
            _blur_along_(some, plan.kernels, axis)

    def at_once_(some: Tensor) -> None:
        some.copy_(_convolved(some, plan.kernels))

    # A CPU is faster tap by tap in its cache; an accelerator with fewer passes over memory.
    _on_rows_(images, plan.blurred, along_both_ if images.device.type == "cpu" else at_once_)


def _half_gaussians(sigma: NDArray[np.float64], radius: int) -> NDArray[np.float32]:
    """(taps, B) weights of the centre and of the taps on one side of it, as many as the widest needs."""
    taps = np.arange(radius + 1)[:, None]
    weights = np.where(taps <= _BLUR_REACH * sigma, np.exp(-0.5 * (taps / sigma) ** 2), 0)
    weights /= weights[0] + 2 * weights[1:].sum(axis=0)
    return weights[weights.any(axis=1)].astype(np.float32)


def _blur_along_(images: Tensor, kernels: Tensor, axis: int) -> None:
    """Blur (B, 3, H, W) along one axis, two taps at a time, in place; kernels as `_half_gaussians`."""
    radius, side = len(kernels) - 1, images.shape[axis]
    padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
    padded = F.pad(images, padding, mode="reflect")
    centre, *pairs = kernels[:, :, None, None, None]  # each (B, 1, 1, 1)
    images.mul_(centre)
    for tap, weight in enumerate(pairs, start=1):
        before, after = (padded.narrow(axis, radius + shift, side) for shift in (-tap, tap))
        images.addcmul_(before + after, weight)


def _convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """(B, 3, H, W) blurred along both axes by convolutions, one channel of one image each."""
    count, _, height, width = images.shape
    radius = len(kernels) - 1
    taps = torch.cat((kernels[1:].flip(0), kernels)).T.repeat_interleave(3, dim=0)  # (3 B, taps)
    padded = F.pad(images, (radius,) * 4, mode="reflect").view(1, 3 * count, height + 2 * radius, -1)
    down = F.conv2d(padded, taps[:, None, :, None], groups=3 * count)
    return F.conv2d(down, taps[:, None, None, :], groups=3 * count).view(count, 3, height, width)


def _on_rows_(images: Tensor, rows: Tensor, operation_: Callable[[Tensor], object]) -> None:
    """Apply `operation_` in place to the images `rows` (n,), which are distinct."""
    if len(rows) == len(images):
        operation_(images)
    elif len(rows):
        some = images.index_select(0, rows)  # five times as fast as indexing on a CPU
        operation_(some)
        with any_order():
            images[rows] = some
