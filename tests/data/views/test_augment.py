"""Every batched operation compared with torchvision's, image by image, and whole views compared with the
official order of operations.

This project computes in float without rounding. torchvision on floats agrees within a quarter of one of 255
levels.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mochi.config import Augmentation
from mochi.data.views import augment
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD

LEVEL = 1 / 255
COUNT = 16


@pytest.fixture
def images(picture: Callable[..., Image.Image]) -> Tensor:
    """(16, 3, 24, 32) in [0, 1], with flat, grey and saturated pictures among them."""
    arrays = [np.asarray(picture(seed)) for seed in range(COUNT)]
    batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    batch[0] = 0.5
    batch[1] = batch[1].mean(0)
    batch[2] = (batch[2] > 0.5).float()
    batch[3] = 0
    return batch.contiguous()


def plan(images: Tensor, **fields: np.ndarray) -> augment.Plan:
    """Parameters that change nothing except by `fields`."""
    count = len(images)
    nothing = augment.PhotometricParameters(
        jitter=np.zeros(count, bool),
        order=np.tile(np.arange(4), (count, 1)),
        factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        grey=np.zeros(count, bool),
        sigma=np.zeros(count),
    )
    return augment.make_plan(replace(nothing, **fields), slice(None), images)


ONE = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


@pytest.mark.parametrize("operation", range(4))
def test_each_jitter_operation_equals_torchvision(images: Tensor, operation: int) -> None:
    factors = np.ones((COUNT, 4))
    factors[:, 3] = 0
    span = 0.5 if operation == 3 else 0.9
    factors[:, operation] += np.linspace(-span, span, COUNT)
    ours = images.clone()
    order = np.tile([operation, *({0, 1, 2, 3} - {operation})], (COUNT, 1))
    augment.jitter_(ours, plan(ours, jitter=np.ones(COUNT, bool), order=order, factors=factors))
    for row in range(COUNT):
        factor = float(factors[row, operation])
        assert (ours[row] - ONE[operation](images[row], factor)).abs().max() < LEVEL / 4
        coarse = ONE[operation]((images[row] * 255).round().to(torch.uint8), factor) / 255
        # On 8 bits torchvision truncates the mean grey value and the result, so up to two levels.
        assert (ours[row] - coarse).abs().max() < 2 * LEVEL


def test_jitter_uses_the_order_of_each_image(images: Tensor) -> None:
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(4) for _ in range(COUNT)])
    factors = 1 + 0.4 * rng.uniform(-1, 1, (COUNT, 4))
    factors[:, 3] = rng.uniform(-0.4, 0.4, COUNT)
    chosen = rng.uniform(size=COUNT) < 0.7
    ours = images.clone()
    augment.jitter_(ours, plan(ours, jitter=chosen, order=order, factors=factors))
    for row in range(COUNT):
        expected = images[row]
        for operation in order[row] if chosen[row] else []:
            expected = ONE[operation](expected, float(factors[row, operation]))
        assert (ours[row] - expected).abs().max() < LEVEL / 4
    assert torch.equal(ours[~torch.from_numpy(chosen)], images[~torch.from_numpy(chosen)])


def test_greyscale_equals_torchvision(images: Tensor) -> None:
    chosen = np.arange(COUNT) % 2 == 0
    ours = images.clone()
    augment.greyscale_(ours, plan(ours, grey=chosen))
    for row in range(COUNT):
        expected = F.rgb_to_grayscale(images[row], num_output_channels=3) if chosen[row] else images[row]
        assert (ours[row] - expected).abs().max() < 1e-6


def test_blur_equals_torchvision(images: Tensor) -> None:
    sigma = np.linspace(0.1, 2.0, COUNT)
    sigma[5] = 0
    ours = images.clone()
    augment.blur_(ours, plan(ours, sigma=sigma))
    for row in range(COUNT):
        expected = images[row]
        if sigma[row]:
            expected = F.gaussian_blur(expected[None], [13, 13], [float(sigma[row])] * 2)[0]
        assert (ours[row] - expected).abs().max() < LEVEL / 4


@pytest.mark.parametrize("size", [(4, 20), (20, 4)])
def test_of_a_small_image_the_blur_has_fewer_taps(images: Tensor, size: tuple[int, int]) -> None:
    """A border can be reflected by less than the side: seven taps for four pixels."""
    small = images[4:6, :, : size[0], : size[1]].contiguous()
    ours = small.clone()
    augment.blur_(ours, plan(ours, sigma=np.full(2, 2.0)))
    torch.testing.assert_close(ours, F.gaussian_blur(small, [7, 7], [2.0, 2.0]))


def test_blur_on_an_accelerator_is_the_same(images: Tensor) -> None:
    sigma = np.linspace(0.1, 2.0, COUNT)
    ours, kernels = images.clone(), plan(images, sigma=sigma).kernels
    augment.blur_(ours, plan(images, sigma=sigma))
    assert (augment._convolved(images, kernels) - ours).abs().max() < 1e-6


def test_blur_is_close_to_pillows(images: Tensor, picture: Callable[..., Image.Image]) -> None:
    """MoCo blurs with PIL's GaussianBlur(radius=sigma): three box passes that approximate a Gaussian of
    that standard deviation, over a repeated border. Away from the border the two differ by a few
    levels.
    """
    worst_inside, mean_everywhere = 0.0, 0.0
    for seed, sigma in enumerate(np.linspace(0.1, 2.0, 20).tolist()):
        image = picture(seed, 64, 64)
        tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        augment.blur_(tensor, plan(tensor, sigma=np.array([sigma])))
        pillow = np.asarray(image.filter(ImageFilter.GaussianBlur(radius=sigma))).transpose(2, 0, 1) / 255
        difference = np.abs(tensor[0].numpy() - pillow)
        worst_inside = max(worst_inside, float(difference[:, 6:-6, 6:-6].max()))
        mean_everywhere = max(mean_everywhere, float(difference.mean()))
    assert worst_inside < 3 * LEVEL
    assert mean_everywhere < LEVEL


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_view_equals_the_official_sequence(images: Tensor, version: str) -> None:
    """v1: greyscale, jitter; v2: jitter, greyscale, blur; then ImageNet's normalisation."""
    config = Augmentation(version=version, image_size=24, min_scale=0.2)
    parameters = augment.draw(config, np.arange(COUNT), seed=0, epoch=0, view=0)
    ours = augment.photometric(images.clone(), parameters, version)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for row in range(COUNT):
        image = images[row]
        if version == "v1" and parameters.grey[row]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        for operation in parameters.order[row] if parameters.jitter[row] else []:
            image = ONE[operation](image, float(parameters.factors[row, operation]))
        if version == "v2" and parameters.grey[row]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if version == "v2" and parameters.sigma[row]:
            image = F.gaussian_blur(image[None], [13, 13], [float(parameters.sigma[row])] * 2)[0]
        expected = F.normalize(image, list(augment.IMAGENET_MEAN), list(augment.IMAGENET_STD))
        assert (ours[row] - expected).abs().max() < LEVEL / 0.2


@pytest.mark.parametrize("eight_bits", [False, True])
def test_normalize_equals_torchvision_with_and_without_an_output(images: Tensor, eight_bits: bool) -> None:
    given = (images * 255).round().to(torch.uint8) if eight_bits else images.clone()
    expected = F.normalize(given / 255 if eight_bits else images, [*IMAGENET_MEAN], [*IMAGENET_STD])
    output = torch.empty(images.shape)
    assert augment.normalize(given.clone(), output) is output
    for found in (output, augment.normalize(given)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_parameters_have_the_published_distributions() -> None:
    rows = np.arange(20_000)
    second = augment.draw(
        Augmentation(version="v2", image_size=32, min_scale=0.2), rows, seed=0, epoch=0, view=0
    )
    assert abs(second.jitter.mean() - 0.8) < 0.01
    assert abs(second.grey.mean() - 0.2) < 0.01
    assert abs((second.sigma > 0).mean() - 0.5) < 0.01
    blurred = second.sigma[second.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11
    assert 1.99 < blurred.max() <= 2.0
    for operation, span in enumerate((0.4, 0.4, 0.4, 0.1)):
        centred = second.factors[:, operation] - (operation < 3)
        assert abs(np.abs(centred).max() - span) < 0.01 * span
        assert abs(centred.mean()) < 0.02 * span
    _, counts = np.unique(second.order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.max() / counts.min() < 1.4

    first = augment.draw(
        Augmentation(version="v1", image_size=32, min_scale=0.2), rows, seed=0, epoch=0, view=0
    )
    assert first.jitter.all()
    assert (first.sigma == 0).all()
    assert abs(np.abs(first.factors[:, 3]).max() - 0.4) < 0.01

    sharp = augment.draw(
        Augmentation(version="v2", image_size=32, min_scale=0.2, blur=False), rows, seed=0, epoch=0, view=0
    )
    assert (sharp.sigma == 0).all()
    assert (sharp.factors == second.factors).all()


def test_parameters_are_independent() -> None:
    """No two share a random number: jitter, greyscale, blur, its width, factors and order."""
    config = Augmentation(version="v2", image_size=32, min_scale=0.2)
    draws = augment.draw(config, np.arange(20_000), seed=0, epoch=0, view=0)
    blurred = draws.sigma > 0
    places = draws.order.argsort(axis=1)[:, :3]  # the fourth follows from them
    columns = np.column_stack([draws.jitter, draws.grey, blurred, draws.factors, places])
    # The places of the operations exclude each other: -1 / 3.
    expected = np.eye(columns.shape[1])
    expected[-3:, -3:] = np.where(np.eye(3), 1, -1 / 3)
    assert np.abs(np.corrcoef(columns.T) - expected).max() < 0.04
    with_width = np.column_stack([draws.sigma, np.delete(columns, 2, axis=1)])[blurred]
    assert np.abs(np.corrcoef(with_width.T)[0, 1:]).max() < 0.04


def test_splitting_a_batch_changes_nothing(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU processes a batch in parts that fit the cache."""
    config = Augmentation(version="v2", image_size=24, min_scale=0.2)
    parameters = augment.draw(config, np.arange(COUNT), seed=0, epoch=0, view=0)
    whole = augment.photometric(images.clone(), parameters, "v2")
    monkeypatch.setattr("mochi.data.views.crops._CACHE_FLOATS", 3 * images[0].numel())
    assert torch.allclose(augment.photometric(images.clone(), parameters, "v2"), whole, atol=1e-6)
