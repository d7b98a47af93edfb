"""Ground-truth annotations of a detection set, whatever file format they come from.

Boxes are (x0, y0, x1, y1) in continuous pixel coordinates from 0: a box that covers an image of width W
and height H is (0, 0, W, H). Labels run from 1 to K; 0 is the background and is in no file.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mochi.errors import UserError

# A COCO segmentation: run lengths {"size": [H, W], "counts": ...}, compressed.
RunLengths = dict[str, Any]


class AnnotationError(UserError):
    """Annotations that cannot be used; the text names file and object and says what to do."""


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its n objects."""

    image_id: str | int
    path: Path
    height: int
    width: int
    boxes: NDArray[np.float32]  # (n, 4)
    labels: NDArray[np.int64]  # (n,)
    ignored: NDArray[np.bool_]  # (n,) difficult (VOC) or crowd (COCO): no detection gains or loses by it
    trained: NDArray[np.bool_]  # (n,) whether the detector learns from it
    masks: tuple[RunLengths, ...] | None = None  # n of them
    areas: NDArray[np.float64] | None = None  # (n,) COCO's areas, which its size classes go by


@dataclass(frozen=True)
class Annotations:
    """A split: K class names, its images, and what was found wrong in its files."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    found: Counter[str] = field(default_factory=Counter)
    """What the reader counted, defects included."""

    def __post_init__(self) -> None:
        for image in self.images:
            _check(image, len(self.classes))

    def report(self) -> dict[str, Any]:
        """Counts for a log and for provenance, the class table included."""
        labels = (
            np.concatenate([image.labels for image in self.images]) if self.images else np.zeros(0, int)
        )
        counts = np.bincount(labels, minlength=len(self.classes) + 1)
        return {
            "images": len(self.images),
            "objects": int(counts.sum()),
            "classes": {name: int(counts[1 + index]) for index, name in enumerate(self.classes)},
            **dict(sorted(self.found.items())),
        }


def _check(image: AnnotatedImage, num_classes: int) -> None:
    """Refuse before any computation what would fail as an index error on a GPU."""
    wrong = image.labels[(image.labels < 1) | (image.labels > num_classes)]
    if len(wrong):
        raise AnnotationError(
            f"{image.path}: found label {wrong[0]}; labels of {num_classes} classes run from 1 to "
            f"{num_classes} (0 is the background); correct the class list"
        )
    sides = image.boxes[:, 2:] - image.boxes[:, :2]
    if not np.isfinite(image.boxes).all() or (sides <= 0).any():
        raise AnnotationError(
            f"{image.path}: found a box without an area or not finite; readers drop those"
        )


def clip(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(n, 4) boxes cut to the image."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(boxes, 0, limits)


def merge(parts: list[Annotations]) -> Annotations:
    """Several splits as one, in order; their classes must agree.

    Raises:
        AnnotationError: the class lists differ.
    """
    classes = parts[0].classes
    for part in parts[1:]:
        if part.classes != classes:
            raise AnnotationError(f"splits with different classes: found {classes} and {part.classes}")
    images = tuple(image for part in parts for image in part.images)
    return Annotations(classes, images, sum((part.found for part in parts), Counter()))


def for_training(annotations: Annotations, empty_images: str) -> Annotations:
    """What a detector trains on: crowds left out; images without a box kept or dropped, and counted.

    Source: detectron2 data/build.py drops images without usable annotations (1,021 of COCO's train2017).
    """
    images = []
    found = Counter(annotations.found)
    for image in annotations.images:
        keep = image.trained
        found["images without a trained box"] += int(not keep.any())
        if not keep.any() and empty_images == "drop":
            continue
        masks = image.masks
        if masks is not None:
            masks = tuple(mask for mask, kept in zip(masks, keep, strict=True) if kept)
        images.append(
            AnnotatedImage(
                image.image_id, image.path, image.height, image.width,
                image.boxes[keep], image.labels[keep], image.ignored[keep], image.trained[keep], masks,
                None if image.areas is None else image.areas[keep],
            )
        )  # fmt: skip
    if not images:
        raise AnnotationError(
            "no training image has a usable box; look at the counts: "
            + ", ".join(f"{name}: {count}" for name, count in sorted(found.items()))
        )
    return Annotations(annotations.classes, tuple(images), found)


def split_off(
    annotations: Annotations, share: float, rng: np.random.Generator
) -> tuple[Annotations, Annotations]:
    """(rest, part): `share` of the images drawn at random, to validate on.

    Raises:
        AnnotationError: fewer than two images.
    """
    order = rng.permutation(len(annotations.images))
    size = min(max(round(share * len(order)), 1), len(order) - 1)
    if size < 1:
        raise AnnotationError(
            f"found {len(order)} training image(s); a validation part needs at least 2: give one lr instead"
        )
    part, rest = (
        Annotations(annotations.classes, tuple(annotations.images[i] for i in sorted(chosen)))
        for chosen in (order[:size], order[size:])
    )
    return rest, part
