"""Batched windows and resizing compared with torchvision's, one image at a time.

Windows are compared with RandomResizedCrop's own loop and the same random numbers; pixels with
torchvision's on floats, and with torchvision's and Pillow's on 8-bit images, which round twice: within one
level.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mochi.data.views import counter_rng as draws
from mochi.data.views import crops


def levels_apart(ours: Tensor, theirs: Tensor) -> int:
    """Largest difference in levels of 255; ours are rounded to 8 bits as theirs are."""
    return int(((ours * 255).round().int() - theirs.int()).abs().max())


def loop_window(u: np.ndarray, height: int, width: int, min_scale: float) -> tuple[int, int, int, int]:
    """torchvision RandomResizedCrop.get_params, its random numbers taken from `u`."""
    area = height * width
    for attempt in range(10):
        target = area * (min_scale + (1 - min_scale) * u[attempt])
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[10 + attempt])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("min_scale", [0.08, 0.2, 1.0])
def test_windows_equal_torchvisions(min_scale: float) -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 60, 500), rng.integers(1, 60, 500)
    heights[:50], widths[50:100] = 3, 2  # panoramas, for which all attempts fail
    heights[100:150], widths[100:150] = 1, 1  # attempts without a row or column
    rows = np.arange(500)
    windows, flips = crops.draw(rows, heights, widths, min_scale=min_scale, seed=1, epoch=2, view=0)
    u = draws.uniforms("crop", 1, 2, 0, indices=rows, columns=23)
    expected = [loop_window(u[row], int(heights[row]), int(widths[row]), min_scale) for row in range(500)]
    assert windows.tolist() == [list(window) for window in expected]
    assert np.array_equal(flips, u[:, 22] < 0.5)
    assert (windows[:, 0] + windows[:, 2] <= heights).all()
    assert (windows[:, 1] + windows[:, 3] <= widths).all()
    assert windows[:, 2:].min() >= 1


def test_crop_scale_and_ratio_have_the_published_distribution() -> None:
    side = np.full(20_000, 500)
    windows, _ = crops.draw(np.arange(20_000), side, side, min_scale=0.2, seed=0, epoch=0, view=1)
    params = [
        v2.RandomResizedCrop(500, scale=(0.2, 1.0)).make_params([torch.empty(3, 500, 500)])
        for _ in range(2000)
    ]
    theirs = np.array([[p["height"] * p["width"] / 500**2, p["height"] / p["width"]] for p in params])
    ours = np.stack([windows[:, 2] * windows[:, 3] / 500**2, windows[:, 2] / windows[:, 3]], 1)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.025
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.025


@pytest.mark.parametrize(("source", "size"), [((32, 32), 32), ((40, 56), 24), ((96, 70), 33), ((5, 9), 16)])
def test_crop_resize_equals_torchvision(
    source: tuple[int, int], size: int, picture: Callable[..., Image.Image]
) -> None:
    height, width = source
    images = [np.array(picture(seed, height, width)) for seed in range(12)]
    sides = np.full(12, height), np.full(12, width)
    windows, flips = crops.draw(np.arange(12), *sides, min_scale=0.1, seed=0, epoch=0, view=0)
    other = crops.draw(np.arange(12), *sides, min_scale=0.1, seed=0, epoch=0, view=1)
    pixels = torch.from_numpy(np.stack(images))
    both = crops.crop_resize(pixels, [other, (windows, flips)], size)
    ours = both[1]
    assert torch.equal(both[0], crops.crop_resize(pixels, [other], size)[0])
    assert ours.shape == (12, 3, size, size)
    for row, image in enumerate(images):
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = F.resized_crop(tensor, *windows[row].tolist(), [size, size], antialias=True)
        expected = F.horizontal_flip(expected) if flips[row] else expected
        assert levels_apart(ours[row], expected) <= 1
        exact = F.resized_crop(tensor / 255, *windows[row].tolist(), [size, size], antialias=True)
        exact = F.horizontal_flip(exact) if flips[row] else exact
        assert (ours[row] - exact).abs().max() < 1e-5
        # and the function for images that are stored encoded
        coarse = crops.crop_image(tensor, windows[row], bool(flips[row]), size)
        assert torch.equal(coarse, expected)
        top, left, h, w = windows[row].tolist()
        pillow = (
            Image.fromarray(image)
            .crop((left, top, left + w, top + h))
            .resize((size, size), Image.Resampling.BILINEAR)
        )
        pillow = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        assert levels_apart((pillow.flip(2) if flips[row] else pillow) / 255, coarse) <= 1


@pytest.mark.parametrize(
    ("source", "resize", "size"),
    [((40, 56), 32, 28), ((56, 41), 30, 25), ((32, 32), 32, 32), ((20, 33), 50, 45)],
)
def test_centre_crops_equal_torchvision(
    source: tuple[int, int], resize: int, size: int, picture: Callable[..., Image.Image]
) -> None:
    transform = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
    images = [picture(seed, *source) for seed in range(3)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    ours = crops.centre_resize(pixels, resize, size)
    for row, image in enumerate(images):
        expected = transform(pixels[row].permute(2, 0, 1))
        assert levels_apart(ours[row], expected) <= 1
        coarse = crops.centre_image(pixels[row].permute(2, 0, 1), resize, size)
        assert torch.equal(coarse, expected)
        pillow = torch.from_numpy(np.array(transform(image))).permute(2, 0, 1)
        assert levels_apart(pillow / 255, coarse) <= 2  # its weights have 16 bits, Pillow's 22


@pytest.mark.parametrize("tall", [False, True])
def test_only_the_centre_of_a_strip_is_resized(
    tall: bool, picture: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 3 x 12,000 pixels would become 32 x 128,000, of which 24 columns are used."""
    resize, resized = crops._resize, []
    monkeypatch.setattr(crops, "_resize", lambda *of: resized.append(of[0].shape) or resize(*of))
    strip = torch.from_numpy(np.array(picture(0, 3, 12_000))).permute(2, 0, 1)
    middle = strip[:, :, 5976:6024]
    if tall:
        strip, middle = strip.mT, middle.mT
    view = crops.centre_image(strip, 32, 24)
    assert torch.equal(view, v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(24)])(middle))
    assert resized == [middle.shape]


def test_a_large_image_is_a_chunk_of_its_own() -> None:
    small = list(crops.chunks(10, 3 * 160**2, torch.device("cpu")))
    assert small == [slice(0, 10)]
    assert list(crops.chunks(11, 3 * 160**2, torch.device("cpu"))) == [*small, slice(10, 11)]
    large = list(crops.chunks(2, 3 * 224**2, torch.device("cpu")))
    assert large == [slice(0, 1), slice(1, 2)]
    assert list(crops.chunks(2, 3 * 224**2, torch.device("meta"))) == [slice(0, 2)]


def test_resampling_rows_sum_to_one_and_stay_in_the_window() -> None:
    start, length = torch.tensor([3.0, 0.0]), torch.tensor([5.0, 12.0])
    weights = crops.resampling(start, length, 12, 7)
    assert torch.allclose(weights.sum(2), torch.ones(2, 7))
    assert (weights[0, :, :3] == 0).all()
    assert (weights[0, :, 8:] == 0).all()


def test_the_middle_is_cut_along_either_axis() -> None:
    image = torch.arange(7 * 12).view(1, 7, 12)
    assert torch.equal(crops._middle(image, 6), image[:, :6, 3:9])
    assert torch.equal(crops._middle(image.mT, 6), image.mT[:, 3:9, :6])
