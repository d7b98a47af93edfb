"""Ground-truth annotations of a detection set, from any file format.

Boxes are (x0, y0, x1, y1) in continuous pixel coordinates from 0: a box that covers an image of width W
and height H is (0, 0, W, H). Labels run from 1 to K; 0 is the background and does not occur in files.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mochi.errors import DataError

# A COCO segmentation: run lengths {"size": [H, W], "counts": ...}, compressed.
RunLengths = dict[str, Any]


AnnotationError = DataError
"""Annotations that cannot be used; the message names file and object and says what to do."""

_SHOWN = 5


class Mistakes:
    """Mistakes of many files, reported together, so that a user can correct them at once."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the mistake that ends the block."""
        try:
            yield
        except AnnotationError as error:
            self._texts.append(str(error))

    def refuse(self) -> None:
        """Raise the first few, if there are any."""
        if self._texts:
            rest = len(self._texts) - _SHOWN
            more = [f"... and {rest} more mistakes like these"] if rest > 0 else []
            raise AnnotationError("\n".join([*self._texts[:_SHOWN], *more]))


def drop(where: str, defect: str, broken_objects: str, counts: Counter[str], dropped: list[str]) -> None:
    """Drop an object that cannot be used, or refuse it."""
    if broken_objects == "fail":
        raise AnnotationError(f"{where}: {defect}; correct the file, or set broken_objects: drop")
    counts[f"objects dropped: {defect}"] += 1
    dropped.append(f"{where}: {defect}")


def render_counts(counts: Counter[str]) -> str:
    """What readers counted, for a message."""
    return (
        ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()) if count)
        or "nothing counted"
    )


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its n objects."""

    image_id: str | int
    path: Path
    height: int
    width: int
    boxes: NDArray[np.float32]  # (n, 4)
    labels: NDArray[np.int64]  # (n,)
    ignored: NDArray[np.bool_]  # (n,) difficult (VOC) or crowd (COCO): ignored in evaluation
    trained: NDArray[np.bool_]  # (n,) whether the detector is trained on it
    masks: tuple[RunLengths, ...] | None = None  # n of them
    areas: NDArray[np.float64] | None = None  # (n,) COCO's areas, which define its size classes


@dataclass(frozen=True)
class Annotations:
    """A split: K class names, its images, and the defects of its files."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    counts: Counter[str] = field(default_factory=Counter)
    """What the reader counted, defects included."""
    numbering: str = ""
    """The first number of pixels (VOC) or categories (COCO): one decision for the whole set."""
    dropped: tuple[str, ...] = ()
    """Objects that cannot be used, each with its position and the reason."""

    def __post_init__(self) -> None:
        for image in self.images:
            _check(image, len(self.classes))

    def report(self) -> dict[str, Any]:
        """Counts for a log and for provenance, the class table included."""
        labels = (
            np.concatenate([image.labels for image in self.images]) if self.images else np.zeros(0, int)
        )
        per_class = np.bincount(labels, minlength=len(self.classes) + 1)
        return {
            "images": len(self.images),
            "objects": int(per_class.sum()),
            "classes": {name: int(per_class[1 + index]) for index, name in enumerate(self.classes)},
            **({"numbering": self.numbering} if self.numbering else {}),
            **dict(sorted(self.counts.items())),
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
            f"{image.path}: found a box without an area or not finite in its annotation; remove it"
        )


def clip(boxes: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """(n, 4) boxes clipped to the image, in any precision."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    inside: NDArray[np.float32] = np.clip(boxes, 0, limits).astype(np.float32)
    return inside


def count_cut(boxes: NDArray[Any], height: int, width: int, counts: Counter[str]) -> None:
    """Count the (n, 4) boxes that `clip` changes by more than rounding: COCO's x + w may be 640 + 1e-13."""
    cut = ~np.isclose(clip(boxes, height, width), boxes, rtol=1e-6)
    counts["boxes cut to the image"] += int(cut.any(axis=1).sum())


def merge(parts: list[Annotations]) -> Annotations:
    """Several splits as one, in order; their classes must agree.

    Raises:
        AnnotationError: the class lists differ.
    """
    classes = parts[0].classes
    for part in parts[1:]:
        require_same_classes(classes, part.classes)
    images = tuple(image for part in parts for image in part.images)
    return Annotations(classes, images, sum((part.counts for part in parts), Counter()), parts[0].numbering,
                       tuple(each for part in parts for each in part.dropped))  # fmt: skip


def require_same_classes(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Raise what differs between the classes of two splits."""
    if first == second:
        return
    alone = [", ".join(sorted(set(one) - set(other))) for one, other in ((first, second), (second, first))]
    if any(alone):
        parts = [
            f"{where}: {names}" for where, names in zip(("the first", "the second"), alone, strict=True)
        ]
        text = f"only in {'; only in '.join(part for part in parts if not part.endswith(': '))}"
    else:
        place = next(i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)
        text = f"number {place + 1} is {first[place]!r} in the first and {second[place]!r} in the second"
    raise AnnotationError(f"two splits have different classes: {text}; give them one list in one order")


def for_training(annotations: Annotations, empty_images: str) -> Annotations:
    """The training annotations: without crowds; images without a box kept or dropped, and counted.

    Source: detectron2 data/build.py drops images without usable annotations (1,021 of COCO's train2017).
    """
    images = []
    counts = Counter(annotations.counts)
    for image in annotations.images:
        keep = image.trained
        counts["images without a trained box"] += int(not keep.any())
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
    if not any(len(image.boxes) for image in images):
        raise AnnotationError(
            f"found no object to train on in {len(annotations.images)} training images "
            f"({render_counts(counts)}); nothing can be trained or measured without one"
        )
    return Annotations(annotations.classes, tuple(images), counts, annotations.numbering)


def split_off(
    annotations: Annotations, share: float, rng: np.random.Generator
) -> tuple[Annotations, Annotations]:
    """(rest, part): a random `share` of the images, for validation.

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
