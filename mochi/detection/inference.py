"""Run a detector on a split: detections in the coordinates of the original images."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mochi.detection.annotations import AnnotatedImage
from mochi.detection.average_precision import Detections
from mochi.detection.batches import Batch, Images, PlainItems, stream
from mochi.detection.coco import encode_masks
from mochi.detection.model import Detector
from mochi.runtime import distributed
from mochi.runtime.progress import Progress
from mochi.storage.atomic import write_json

logger = logging.getLogger(__name__)

Features = Callable[[Batch], Tensor]

_PASTED_BYTES = 1 << 28


def detect(
    detector: Detector,
    images: Images,
    short_side: int,
    longest: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    parts: Path,
    features: Features | None = None,
    workers: int = 0,
) -> Detections:
    """Run the detector over all images of a split; several processes divide them.

    Args:
        detector: put into evaluation mode.
        images: the split.
        short_side: of the resized image, pixels.
        longest: bound on the long side, pixels.
        batch_size: images at once.
        autocast: the precision to run in.
        parts: folder through which processes exchange their parts; not used by a single one.
        features: the backbone, if not the detector's own (frozen and kept).
        workers: processes that read images.

    Returns:
        The detections of all images, in the order of the images, the same on every process.
    """
    detector.eval()
    device = next(detector.parameters()).device
    own = range(distributed.rank(), len(images.annotations.images), distributed.world_size())
    keys = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    batches = stream(
        PlainItems(images, short_side, longest),
        keys,
        workers,
        device,
        batch_size * images.largest(short_side, longest),
    )
    entries = []
    with Progress("detecting", len(keys)) as progress, torch.inference_mode():
        for batch in batches:
            with autocast():
                if features is None:
                    results = detector(batch.images(device), batch.sizes)
                else:
                    results = detector.from_features(features(batch), batch.sizes)
            for index, size, result in zip(batch.indices, batch.sizes, results, strict=True):
                entries.append(_as_json(images.annotations.images[index], index, size, result))
            progress.advance()
    if distributed.world_size() > 1:
        entries = _gather_through_files(entries, parts)
    return _as_detections(sorted(entries, key=lambda part: part["image"]))


def _as_json(
    annotated: AnnotatedImage, index: int, size: tuple[int, int], result: dict[str, Tensor]
) -> dict[str, Any]:
    """One image's detections as JSON: boxes scaled back to the original image, masks as run lengths."""
    ratio = torch.tensor([annotated.width / size[1], annotated.height / size[0]]).repeat(2)
    boxes = result["boxes"].cpu() * ratio
    entry: dict[str, Any] = {
        "image": index,
        "boxes": boxes.tolist(),
        "scores": result["scores"].cpu().tolist(),
        "labels": result["labels"].cpu().tolist(),
    }
    if "masks" in result:
        masks = [
            mask
            for inside in paste(result["masks"][:, 0], boxes, annotated.height, annotated.width)
            for mask in encode_masks(inside.cpu().numpy())
        ]
        entry["masks"] = [{"size": mask["size"], "counts": mask["counts"].decode()} for mask in masks]
    return entry


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Masks of boxes (n, m, m) and the boxes (n, 4) -> pixels inside, (part of n, height, width) bool.

    A pixel is inside if the mask is at least .5 at its centre, between the centres of the mask's cells
    by their distance (bilinear) and 0 outside the mask.

    Source: detectron2 layers/mask_ops.py `paste_masks_in_image`, at the exact box; torchvision's function
    of that name rounds the box to pixels.
    """
    boxes = boxes.to(masks)
    part = max(_PASTED_BYTES // (4 * height * width), 1)
    for first in range(0, len(boxes), part):
        x0, y0, x1, y1 = boxes[first : first + part].unbind(1)
        cells = masks.shape[-1]
        rows, columns = _weights(y0, y1, height, cells), _weights(x0, x1, width, cells)
        yield rows @ masks[first : first + part] @ columns.mT >= 0.5


def _weights(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
    """(n, pixels, cells): weight of each cell of [low, high] at each pixel's centre."""
    centres = torch.arange(pixels, device=low.device) + 0.5
    positions = (centres - low[:, None]) / (high - low)[:, None] * cells - 0.5  # in cells
    distances = positions[:, :, None] - torch.arange(cells, device=low.device)
    return (1 - distances.abs()).clamp(min=0)


def _gather_through_files(own: list[dict[str, Any]], parts: Path) -> list[dict[str, Any]]:
    """Gather all parts through files, because gathering Python objects would use pickle."""
    write_json(parts / f"part-{distributed.rank()}.json", own)
    distributed.barrier()
    gathered = [
        entry
        for rank in range(distributed.world_size())
        for entry in json.loads((parts / f"part-{rank}.json").read_text(encoding="utf-8"))
    ]
    distributed.barrier()
    (parts / f"part-{distributed.rank()}.json").unlink()
    return gathered


def _as_detections(entries: list[dict[str, Any]]) -> Detections:
    masks = None
    if entries and "masks" in entries[0]:
        masks = [
            {**mask, "counts": mask["counts"].encode()} for entry in entries for mask in entry["masks"]
        ]
    return Detections(
        np.array([entry["image"] for entry in entries for _ in entry["scores"]], np.int64),
        np.array([box for entry in entries for box in entry["boxes"]], np.float32).reshape(-1, 4),
        np.array([score for entry in entries for score in entry["scores"]], np.float32),
        np.array([label for entry in entries for label in entry["labels"]], np.int64),
        masks,
    )
