"""Batches compared with their definition: sizes by detectron2's rule, every image once in an epoch, and
the same batch for the same number.
"""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mochi.detection import batches, voc
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations
from mochi.detection.batches import (
    Images,
    Item,
    PlainItems,
    TrainingItems,
    collate,
    read_rgb,
    resized_size,
    stream,
)
from mochi.detection.coco import encode_masks
from mochi.errors import UserError
from mochi.runtime import watchdog

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [
        (375, 500, 800, (800, 1067)),
        (500, 375, 800, (1067, 800)),
        (480, 640, 800, (800, 1067)),
        (100, 500, 800, (267, 1333)),  # the long side is bounded
        (128, 128, 128, (128, 128)),
        (1, 900, 800, (1, 1333)),
        (1, 9000, 800, (1, 1333)),  # not 0
        (9000, 1, 800, (1333, 1)),
    ],
)
def test_sizes_by_detectron2s_rule(
    height: int, width: int, short_side: int, expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, short_side, 1333) == expected


def detectron2s_size(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """Written as ResizeShortestEdge.get_output_shape."""
    scale = short_side / min(height, width)
    h, w = (short_side, scale * width) if height < width else (scale * height, short_side)
    if max(h, w) > longest:
        scale = longest / max(h, w)
        h, w = h * scale, w * scale
    return int(h + 0.5), int(w + 0.5)


def test_sizes_of_many_images_are_detectron2s() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(100, 1000, (500, 2)).tolist():
        for short_side in (480, 800):
            expected = detectron2s_size(height, width, short_side, 1333)
            assert resized_size(height, width, short_side, 1333) == expected


def picture(path: Path, width: int, height: int, boxes: list[list[float]]) -> AnnotatedImage:
    """An image with a mask that fills each box."""
    seed = width * 1000 + height
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    number = len(boxes)
    return AnnotatedImage(
        path.stem, path, height, width, np.array(boxes, np.float32).reshape(-1, 4),
        np.ones(number, np.int64), np.zeros(number, bool), np.ones(number, bool),
        tuple(encode_masks(masks)),
    )  # fmt: skip


def test_boxes_and_masks_follow_the_image(tmp_path: Path) -> None:
    images = Images(Annotations(("a",), (picture(tmp_path / "x.png", 40, 20, [[4, 2, 12, 10]]),)))
    plain = images.item(0, 40, 999, flipped=False)
    assert plain.image.shape == (40, 80, 3)
    assert plain.boxes.tolist() == [[8, 4, 24, 20]]
    flipped = images.item(0, 40, 999, flipped=True)
    assert torch.equal(flipped.image, plain.image.flip(1))
    assert flipped.boxes.tolist() == [[56, 4, 72, 20]]
    for item in (plain, flipped):
        assert item.masks is not None
        rows, columns = torch.where(item.masks[0])
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert item.masks.shape == (1, 20, 40)  # as it was annotated: only the image is resized
        assert [2 * float(value) for value in around] == item.boxes[0].tolist()


def test_boxes_that_vanish_in_resizing_are_dropped_and_counted(tmp_path: Path) -> None:
    annotated = picture(tmp_path / "x.png", 40, 20, [[4, 2, 12, 10], [1, 1, 1.05, 9], [3, 3, 9, 9]])
    item = Images(Annotations(("a",), (annotated,))).item(0, 2, 999, flipped=False)
    assert item.vanished == 1
    assert len(item.boxes) == len(item.labels) == 2
    assert item.masks is not None
    assert len(item.masks) == 2


def test_an_image_without_boxes_has_an_empty_target(tmp_path: Path) -> None:
    item = Images(Annotations(("a",), (picture(tmp_path / "x.png", 40, 20, []),))).item(
        0, 30, 99, flipped=True
    )
    assert item.boxes.shape == (0, 4)
    assert item.masks is not None
    assert item.masks.shape == (0, 20, 40)


def test_padding_is_zero_after_normalisation(tmp_path: Path) -> None:
    images = Images(
        Annotations(("a",), (picture(tmp_path / "x.png", 40, 20, [[0, 0, 5, 5]]),
                             picture(tmp_path / "y.png", 21, 33, []))))  # fmt: skip
    batch = collate([images.item(0, 20, 99, flipped=False), images.item(1, 21, 99, flipped=False)])
    shown = batch.images(CPU)
    # The largest size in the batch, not a multiple of the stride (detectron2's C4).
    assert shown.shape == (2, 3, 33, 40)
    assert shown.is_contiguous(memory_format=torch.channels_last)
    assert batch.pixels.dtype == torch.uint8
    assert batch.sizes == [(20, 40), (33, 21)]
    assert not shown[0, :, 20:].any()
    assert not shown[1, :, :, 21:].any()
    pixels = torch.from_numpy(read_rgb(tmp_path / "x.png").copy()).permute(2, 0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(shown[0, :, :20], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch.images(CPU, [1])[0], shown[1])
    assert [each["masks"].shape for each in batch.targets(CPU)] == [(1, 20, 40), (0, 33, 21)]


@pytest.fixture
def many(tmp_path: Path) -> Images:
    """Five wide images and two tall ones."""
    sizes = [(40, 20)] * 5 + [(20, 40)] * 2
    return Images(
        Annotations(
            ("a",),
            tuple(
                picture(tmp_path / f"{index}.png", width, height, [[1, 2, 9 + index, 12]])
                for index, (width, height) in enumerate(sizes)
            ),
        )
    )


def items(images: Images, micro_batch: int, seed: int = 0) -> TrainingItems:
    return TrainingItems(images, micro_batch, [20, 24], 99, flip=True, seed=seed)


def test_an_epoch_has_every_image_and_few_batches_of_mixed_shape(many: Images) -> None:
    dataset = items(many, 2)
    assert dataset.per_epoch == 4
    orders = []
    for epoch in range(3):
        rows = [dataset.indices(epoch * 4 + index).tolist() for index in range(4)]
        counts = Counter(index for row in rows for index in row)
        assert set(counts) == set(range(7))
        assert sorted(counts.values()) == [1] * 6 + [2]  # filled up from the start of the epoch
        # 2 wide pairs and 1 tall pair; only the image left over is in a mixed batch.
        assert sum(len({index >= 5 for index in row}) == 1 for row in rows) >= 3
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]


def test_images_are_mirrored_and_resized_at_random_in_training_only(
    many: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of 4,000 are mirrored, half have each of the two sizes."""
    seen = []

    def item(index: int, short_side: int, longest: int, flipped: bool) -> None:
        seen.append((flipped, short_side))

    monkeypatch.setattr(many, "item", item)
    dataset = items(many, 2)
    for number in range(2000):
        dataset[number]
    flipped, sizes = zip(*seen, strict=True)
    assert abs(np.mean(flipped) - 0.5) < 0.03
    assert abs(np.mean(np.array(sizes) == 20) - 0.5) < 0.03
    seen.clear()
    PlainItems(many, 20, 99)[range(7)]
    TrainingItems(many, 7, [20], 99, flip=False, seed=0)[0]
    assert seen == [(False, 20)] * 14


def test_fewer_images_than_a_batch_are_repeated(many: Images) -> None:
    row = items(many, 10).indices(0)
    assert len(row) == 10
    assert set(row.tolist()) == set(range(7))


def test_a_batch_depends_on_its_number_only(many: Images) -> None:
    dataset, again = items(many, 2), items(many, 2)
    late = again[9]
    straight = [dataset[number] for number in range(10)]
    for a, b in zip(straight[9], late, strict=True):
        assert (a.index, a.flipped) == (b.index, b.flipped)
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.boxes, b.boxes)
    for workers in (0, 2):
        before = torch.get_rng_state()
        for number, batch in zip(
            range(7, 10), stream(items(many, 2), range(7, 10), workers, CPU, 1), strict=True
        ):
            expected = collate(straight[number])
            assert (batch.indices, batch.flipped) == (expected.indices, expected.flipped)
            assert torch.equal(batch.pixels, expected.pixels)
        # The default generator samples anchors and regions.
        assert torch.equal(torch.get_rng_state(), before)
    sides_and_flips = {(item.image.shape[0], item.flipped) for batch in straight for item in batch}
    assert {flipped for _, flipped in sides_and_flips} == {False, True}
    assert {side for side, _ in sides_and_flips} >= {20, 24}


def test_half_of_the_images_are_mirrored_and_sizes_are_equally_frequent(
    many: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: Counter[tuple[int, bool]] = Counter()

    def item(index: int, short_side: int, longest: int, flipped: bool) -> None:
        assert longest == 99
        shown[short_side, flipped] += 1

    monkeypatch.setattr(many, "item", item)
    for number in range(1000):
        items(many, 2)[number]
    for side in (20, 24):
        for flipped in (False, True):
            assert abs(shown[side, flipped] - 500) < 80  # four standard deviations
    unflipped = TrainingItems(many, 2, [20], 99, flip=False, seed=0)
    shown.clear()
    for number in range(20):
        unflipped[number]
    assert shown == {(20, False): 40}


def test_unreadable_and_swapped_images_are_named(many: Images) -> None:
    path = many.annotations.images[0].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AnnotationError, match=r"0\.png: cannot be read as an image"):
        many.item(0, 20, 99, flipped=False)
    for workers in (0, 1):
        with pytest.raises(AnnotationError, match=r"^\S+0\.png: cannot be read as an image: [^\n]*$"):
            list(stream(items(many, 7), [0], workers, CPU, 1))
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(AnnotationError, match=r"0\.png: the image is 30 x 20 .* says 40 x 20"):
        many.item(0, 20, 99, flipped=False)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # torch notices the kill late
@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (signal.SIGKILL, r"a loading worker ended: "),
        (signal.SIGSTOP, r"1 loading workers did nothing for 1 s; look for their messages"),
    ],
)
def test_a_loading_worker_that_dies_or_hangs_ends_the_run(
    many: Images, monkeypatch: pytest.MonkeyPatch, sent: int, said: str
) -> None:
    real, main = many.item, os.getpid()

    def item(index: int, *arguments: Any, **more: Any) -> Item:
        if index == 4 and os.getpid() != main:
            os.kill(os.getpid(), sent)
        return real(index, *arguments, **more)

    monkeypatch.setattr(many, "item", item)
    monkeypatch.setattr(watchdog, "WORKER_SECONDS", 1.0)
    monkeypatch.setattr(batches, "LOOK_SECONDS", 1)
    loaded = stream(PlainItems(many, 20, 99), [[index] for index in range(7)], 1, CPU, 1)
    with pytest.raises((RuntimeError, UserError)) as caught:
        list(loaded)
    error = caught.value
    assert re.search(said, str(error) if isinstance(error, UserError) else watchdog.reason(error) or "")


def test_grey_photographs_become_three_channels(real_data: Callable[[str], Path]) -> None:
    root = real_data("voc-raccoon.tar") / "raccoon"
    annotations = voc.read(root, "trainval", ["raccoon"], "fail")
    grey = []
    for number, image in enumerate(annotations.images):
        with Image.open(image.path) as file:
            grey += [number] if file.mode == "L" else []
    assert len(grey) == 3
    item = Images(annotations).item(grey[0], 100, 200, flipped=False)
    assert item.image.shape[-1] == 3
    assert torch.equal(item.image[..., 0], item.image[..., 2])
