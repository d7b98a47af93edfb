"""Crops, resizing and flips, for a batch of stored pixels on any device or for one decoded image.

Shapes: B images, S side of a view.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mochi.data.views import counter_rng
from mochi.runtime.transfer import arrays_to

_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10  # RandomResizedCrop gives up after ten windows that do not fit
_SCALE, _RATIO = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP, _COLUMNS = 20, 21, 22, 23

_LONGEST_RATIO = 16  # of the sides, in the part of an image that a centre crop is cut from

# Floats per pass on the CPU: few enough for its caches, enough to amortise the calls. An image that nearly
# fills the cache of one core is a pass of its own.
_CACHE_FLOATS, _LARGE_IMAGE = 800_000, 100_000


Draw = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Windows (B, 4): top, left, height, width; and flips (B,), for one view of each image."""


def draw(
    rows: NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    *,
    min_scale: float,
    seed: int,
    epoch: int,
    view: int,
) -> Draw:
    """One view of the images `rows`.

    The area is `min_scale` to 1 of the image's, the ratio of the sides 3/4 to 4/3. The first of ten
    windows that fits is used, else the largest central one of an allowed ratio.

    Source: torchvision.transforms.RandomResizedCrop, RandomHorizontalFlip.
    """
    uniforms = counter_rng.uniforms("crop", seed, epoch, view, indices=rows, columns=_COLUMNS)
    area = (heights * widths)[:, None] * (min_scale + (1 - min_scale) * uniforms[:, _SCALE])
    ratio = np.exp(_RATIOS[0] + (_RATIOS[1] - _RATIOS[0]) * uniforms[:, _RATIO])
    tried_widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # (B, tries)
    tried_heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    each, first = np.arange(len(fits)), fits.argmax(axis=1)
    any_fits = fits.any(axis=1)
    whole_widths = np.minimum(widths, np.rint(heights * (4 / 3)).astype(np.int64))
    whole_heights = np.minimum(heights, np.rint(widths / (3 / 4)).astype(np.int64))
    h = np.where(any_fits, tried_heights[each, first], whole_heights)
    w = np.where(any_fits, tried_widths[each, first], whole_widths)
    top = np.where(any_fits, np.floor(uniforms[:, _TOP] * (heights - h + 1)), (heights - h) // 2)
    left = np.where(any_fits, np.floor(uniforms[:, _LEFT] * (widths - w + 1)), (widths - w) // 2)
    windows = np.stack([top, left, h, w], axis=1).astype(np.int64)
    return windows, uniforms[:, _FLIP] < 0.5


def resampling(
    start: Tensor, length: Tensor, source: int, target: int, mirrored: Tensor | None = None
) -> Tensor:
    """(B, target, source) weights of antialiased bilinear resizing of [start, start + length).

    `mirrored` (B,) bool: where true, from right to left.

    Source: PIL's and torch's triangle filter, widened by the downsampling factor, truncated and
    renormalised at the window's edges.
    """
    scale = length.float() / target  # (B,)
    support = scale.clamp(min=1)
    steps = torch.arange(target, device=start.device) + 0.5
    if mirrored is not None:
        steps = torch.where(mirrored[:, None], steps.flip(0), steps)
    centres = start[:, None] + steps * scale[:, None]  # (B, target)
    pixels = torch.arange(source, device=start.device) + 0.5
    distance = (pixels - centres[:, :, None]).abs_()  # (B, target, source)
    weights = distance.div_(-support[:, None, None]).add_(1).clamp_(min=0)
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])  # (B, source)
    weights *= inside[:, None].float()
    return weights.div_(weights.sum(dim=2, keepdim=True))


def crop_resize(pixels: Tensor, draws: Sequence[Draw], size: int) -> list[Tensor]:
    """Crop, resize and flip: (B, H, W, 3) uint8 -> for each draw (B, 3, S, S) float32 in [0, 1].

    All three are linear and separable, so an image is multiplied by one matrix from each side.
    """
    _, height, width, _ = pixels.shape
    outputs = [torch.empty(len(pixels), 3, size, size, device=pixels.device) for _ in draws]
    for chunk in chunks(len(pixels), 3 * max(size, height) * max(size, width), pixels.device):
        # (B, H, 3, W): one product for the three channels on each side, three times as fast as one per
        # channel.
        images = torch.stack(pixels[chunk].float().unbind(3), 2).view(-1, height, 3 * width)
        for output, (windows, flips) in zip(outputs, draws, strict=True):
            boxes, mirrored = arrays_to(pixels.device, windows[chunk], flips[chunk])
            top, left, h, w = boxes.unbind(1)
            down = resampling(top, h, height, size)  # (B, S, H)
            across = resampling(left, w, width, size, mirrored).div_(255)  # (B, S, W)
            views = (down @ images).view(-1, size * 3, width) @ across.mT
            output[chunk] = views.view(-1, size, 3, size).permute(0, 2, 1, 3)
    return outputs


def crop_image(image: Tensor, window: NDArray[np.int64], flip: bool, size: int) -> Tensor:
    """The same for one decoded image: (3, H, W) uint8 -> (3, S, S) uint8."""
    top, left, height, width = window.tolist()
    view = _resize(image[:, top : top + height, left : left + width], size, size)
    return view.flip(2) if flip else view


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear in 8 bits, in a third of Pillow's time and within two levels of it."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def resized_size(height: int, width: int, resize: int) -> tuple[int, int]:
    """(height, width) once the short side is `resize`, the ratio kept (torchvision's Resize)."""
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def centre_resize(pixels: Tensor, resize: int, size: int) -> Tensor:
    """Short side to `resize`, then the central square: (B, H, W, 3) uint8 -> (B, 3, S, S) in [0, 1]."""
    count, height, width, _ = pixels.shape
    output = torch.empty(count, 3, size, size, device=pixels.device)
    nothing = torch.zeros(1, device=pixels.device)
    down, across = (
        resampling(nothing, nothing + source, source, target)[0].narrow(0, _margin(target, size), size)
        for source, target in zip((height, width), resized_size(height, width, resize), strict=True)
    )
    for chunk in chunks(count, 3 * max(size, height) * max(size, width), pixels.device):
        images = pixels[chunk].permute(0, 3, 1, 2).float().div_(255)
        output[chunk] = down @ (images @ across.mT)
    return output


def centre_image(image: Tensor, resize: int, size: int) -> Tensor:
    """The same for one decoded image: (3, H, W) uint8 -> (3, S, S) uint8.

    Of an image with an extreme aspect ratio only the middle is resized: all of 1 x 12,000 pixels would
    take gigabytes. The crop is at most half a pixel off the centre.
    """
    image = _middle(image, _LONGEST_RATIO * min(image.shape[1:]))
    height, width = resized_size(image.shape[1], image.shape[2], resize)
    top, left = _margin(height, size), _margin(width, size)
    return _resize(image, height, width)[:, top : top + size, left : left + size]


def _middle(image: Tensor, longest: int) -> Tensor:
    """(3, H, W) -> (3, min(H, longest), min(W, longest)), a view."""
    for axis in (1, 2):
        cut = max(image.shape[axis] - longest, 0)
        image = image.narrow(axis, cut // 2, image.shape[axis] - cut)
    return image


def _margin(side: int, size: int) -> int:
    """torchvision's CenterCrop rounds half to even."""
    return round((side - size) / 2)


def chunks(count: int, floats: int, device: torch.device) -> Iterator[slice]:
    """The batch in pieces that fit the caches of a CPU, `floats` per image; undivided on an accelerator."""
    size = count
    if device.type == "cpu":
        size = _CACHE_FLOATS // floats if floats < _LARGE_IMAGE else 1
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
