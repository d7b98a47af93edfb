"""Detections of several processes compared with one process, and in the coordinates of the original
images.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mochi.detection import voc
from mochi.detection.annotations import Annotations
from mochi.detection.average_precision import Detections
from mochi.detection.batches import Images, collate
from mochi.detection.coco import decode_masks
from mochi.detection.inference import detect
from mochi.detection.model import Detector, build
from mochi.runtime import distributed
from mochi.runtime.precision import autocast
from tests.detection.sets import ENCODER, small_model
from tests.processes import run_ranks

CPU = torch.device("cpu")


def split(root: Path) -> Annotations:
    return voc.read(root, "test", ["square", "bar"], "drop")


def detector(masks: bool = False) -> Detector:
    torch.manual_seed(0)
    return build(ENCODER, 2, small_model(masks=masks))


def found(
    root: Path, parts: Path, *, masks: bool = False, batch_size: int = 2, workers: int = 0
) -> Detections:
    images, precision = Images(split(root)), lambda: autocast(CPU, "float32")
    return detect(detector(masks), images, 32, 99, batch_size, precision, parts, workers=workers)


def _rank(root: Path, parts: Path) -> None:
    result = found(root, parts)
    save_file(
        {name: torch.from_numpy(getattr(result, name)) for name in ("image", "boxes", "scores", "labels")},
        parts / f"found-{distributed.rank()}.safetensors",
    )


def test_two_processes_give_the_detections_of_one(voc_set: Path, tmp_path: Path) -> None:
    """Five images: none is used twice to fill up a share, and none is lost."""
    alone = found(voc_set, tmp_path)
    run_ranks(_rank, 2, voc_set, tmp_path)
    for rank in (0, 1):
        together = load_file(tmp_path / f"found-{rank}.safetensors")
        assert len(together["image"]) == len(alone.image) > 0
        for name in ("image", "boxes", "scores", "labels"):
            np.testing.assert_allclose(together[name].numpy(), getattr(alone, name), rtol=1e-4, atol=1e-3)
    assert not list(tmp_path.glob("part-*"))


def test_detections_are_in_the_coordinates_of_the_original_image(voc_set: Path, tmp_path: Path) -> None:
    """With a detector that returns the corners of its input, the resized image."""
    images = Images(split(voc_set))

    class Corners(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(
            self, batch: torch.Tensor, sizes: list[tuple[int, int]]
        ) -> list[dict[str, torch.Tensor]]:
            return [
                {
                    "boxes": torch.tensor([[0.0, 0.0, w, h], [w / 4, h / 2, w / 2, h]]),
                    "scores": torch.tensor([0.9, 0.8]),
                    "labels": torch.tensor([1, 2]),
                }
                for h, w in sizes
            ]

    for short_side in (17, 32, 80):
        result = detect(Corners(), images, short_side, 99, 2, lambda: autocast(CPU, "float32"), tmp_path)  # type: ignore[arg-type]
        np.testing.assert_allclose(result.boxes[0::2], [[0, 0, 48, 40]] * 5, rtol=1e-5)
        np.testing.assert_allclose(result.boxes[1::2], [[12, 20, 24, 40]] * 5, rtol=1e-5)
        assert result.image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_masks_are_inside_their_boxes(voc_set: Path, tmp_path: Path) -> None:
    result = found(voc_set, tmp_path, masks=True)
    assert result.masks is not None
    assert len(result.masks) == len(result.boxes) > 0
    masks = decode_masks(result.masks, 40, 48)
    for mask, (x0, y0, x1, y1) in zip(masks, result.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert rows.min() >= y0 - 2
            assert rows.max() <= y1 + 2
            assert columns.min() >= x0 - 2
            assert columns.max() <= x1 + 2


def test_detections_do_not_depend_on_batch_size_and_workers(voc_set: Path, tmp_path: Path) -> None:
    one, three = (found(voc_set, tmp_path, batch_size=size) for size in (1, 3))
    np.testing.assert_allclose(one.boxes, three.boxes, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(one.labels, three.labels)
    loaded = found(voc_set, tmp_path, batch_size=3, workers=2)
    np.testing.assert_array_equal(loaded.boxes, three.boxes)
    np.testing.assert_array_equal(loaded.image, three.image)


def test_images_and_their_boxes_are_mirrored_consistently(voc_set: Path) -> None:
    split_images = Images(split(voc_set))
    plain, mirrored = (split_images.item(1, 32, 99, flipped=flag) for flag in (False, True))
    width = plain.image.shape[1]
    images = collate([plain, mirrored]).images(CPU)
    (a, b), (c, d) = mirrored.boxes[0, [0, 2]].tolist(), plain.boxes[0, [0, 2]].tolist()
    np.testing.assert_allclose([a, b], [width - d, width - c], rtol=1e-6)
    assert torch.equal(images[0], images[1].flip(-1))
