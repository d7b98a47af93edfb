"""A detector over a split: detections in the coordinates of the original images."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mochi.detection.average_precision import Detections
from mochi.detection.batches import Batch, Images, collate
from mochi.detection.coco import encode_masks
from mochi.detection.model import Detector
from mochi.runtime import distributed
from mochi.runtime.progress import Progress
from mochi.storage.atomic import write_json

logger = logging.getLogger(__name__)

Features = Callable[[Batch], Tensor]


def detect(
    detector: Detector,
    images: Images,
    short_side: int,
    longest: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    parts: Path,
    features: Features | None = None,
) -> Detections:
    """Run the detector over all images of a split; with several processes each does its share once.

    Args:
        detector: put into evaluation mode.
        images: the split.
        short_side: of the resized image, pixels.
        longest: bound on the long side, pixels.
        batch_size: images at once.
        autocast: the precision to run in.
        parts: folder where processes leave their shares for each other; not used by a single one.
        features: the backbone, if not the detector's own (frozen and kept).

    Returns:
        The detections of all images, in the order of the images, the same on every process.
    """
    detector.eval()
    device = next(detector.parameters()).device
    own = range(distributed.rank(), len(images.annotations.images), distributed.world_size())
    found = []
    with Progress("detecting", -(-len(own) // batch_size)) as progress, torch.inference_mode(), autocast():
        for batch in _batches(images, own, short_side, longest, batch_size, detector.stride):
            if features is None:
                results = detector(batch.images.to(device), batch.sizes)
            else:
                results = detector.from_features(features(batch), batch.sizes)
            for item, size, result in zip(batch.items, batch.sizes, results, strict=True):
                found.append(_one(images, item.index, size, result))
            progress.advance()
    if distributed.world_size() > 1:
        found = _exchange(found, parts)
    return _together(sorted(found, key=lambda part: part["image"]))


def _batches(
    images: Images, own: Sequence[int], short_side: int, longest: int, batch_size: int, stride: int
) -> Iterator[Batch]:
    for first in range(0, len(own), batch_size):
        indices = own[first : first + batch_size]
        yield collate([images.item(index, short_side, longest, flipped=False) for index in indices], stride)


def _one(images: Images, index: int, size: tuple[int, int], result: dict[str, Tensor]) -> dict[str, Any]:
    """One image's detections as JSON: boxes scaled back to the original image, masks as run lengths."""
    annotated = images.annotations.images[index]
    ratio = torch.tensor([annotated.width / size[1], annotated.height / size[0]]).repeat(2)
    boxes = result["boxes"].cpu() * ratio
    one: dict[str, Any] = {
        "image": index,
        "boxes": boxes.tolist(),
        "scores": result["scores"].cpu().tolist(),
        "labels": result["labels"].cpu().tolist(),
    }
    if "masks" in result:
        probabilities = paste_masks_in_image(
            result["masks"].cpu().float(), boxes, (annotated.height, annotated.width)
        )
        masks = encode_masks((probabilities[:, 0] >= 0.5).numpy()) if len(boxes) else []
        one["masks"] = [{"size": mask["size"], "counts": mask["counts"].decode()} for mask in masks]
    return one


def _exchange(found: list[dict[str, Any]], parts: Path) -> list[dict[str, Any]]:
    """Every process's share, through files: a gather of Python objects would go through pickle."""
    write_json(parts / f"part-{distributed.rank()}.json", found)
    distributed.wait()
    everything = [
        one
        for rank in range(distributed.world_size())
        for one in json.loads((parts / f"part-{rank}.json").read_text(encoding="utf-8"))
    ]
    distributed.wait()
    (parts / f"part-{distributed.rank()}.json").unlink()
    return everything


def _together(found: list[dict[str, Any]]) -> Detections:
    masks = None
    if found and "masks" in found[0]:
        masks = [{**mask, "counts": mask["counts"].encode()} for one in found for mask in one["masks"]]
    return Detections(
        np.array([one["image"] for one in found for _ in one["scores"]], np.int64),
        np.array([box for one in found for box in one["boxes"]], np.float32).reshape(-1, 4),
        np.array([score for one in found for score in one["scores"]], np.float32),
        np.array([label for one in found for label in one["labels"]], np.int64),
        masks,
    )
