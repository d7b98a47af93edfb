"""Read both splits of a detection set and compare them with each other and with the images.

Used by the stage before training, and by `mochi check` before anything is computed.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mochi.config import DetectionData
from mochi.data.ingest.classes import alike
from mochi.detection import coco, voc
from mochi.detection.annotations import (
    AnnotationError,
    Annotations,
    for_training,
    merge,
    render_counts,
    require_same_classes,
)
from mochi.detection.check_images import check_images
from mochi.errors import DataError

logger = logging.getLogger(__name__)


def read_splits(data: DetectionData, *, masks: bool) -> tuple[Annotations, Annotations]:
    """Training and test annotations, of one or several folders each; defects are logged.

    Raises:
        AnnotationError: see the readers; or the classes of the splits differ, or one of them has no object.
    """
    train, test = _read(data, masks=masks)
    for names, split in ((data.train, train), (data.test, test)):
        logger.info("%s: %s", " + ".join(names), json.dumps(split.report()))
    for oddity in oddities(train, test):
        logger.warning("%s: %s", data.path, oddity)
    return train, test


_SHOWN_APART = ("images", "objects", "classes")


class Contents(NamedTuple):
    """The content of a set's files."""

    errors: list[str]
    """What would stop training."""
    warnings: list[str]
    """What would degrade training."""
    counts: dict[str, dict[str, Any]]
    """Split -> counts; empty if the files cannot be read."""


def contents_of(data: DetectionData, *, masks: bool, jobs: int) -> Contents:
    """Read a complete set with its images, and report its content instead of raising."""
    counts: dict[str, dict[str, Any]] = {}
    try:
        train, test = _read(data, masks=masks)
        counts = {"train": train.report(), "test": test.report()}
        check_images([train, test], jobs)
    except DataError as error:
        return Contents([str(error)], [], counts)
    return Contents([], oddities(train, test), counts)


def inspect(data: Mapping[str, Any], jobs: int) -> Contents:
    """The contents of a VOC or COCO tree, whose classes are those of its objects.

    Args:
        data: `format`, `path`, `train` and `test` of a detection set.
        jobs: processes that decode images.
    """
    classes = None
    try:
        root, names = Path(data["path"]), [*data["train"], *data["test"]]
        if data["format"] == "voc":
            halves = [name.rpartition("/") for name in names]
            found = [voc.class_names(root / folder, image_set) for folder, _, image_set in halves]
            classes = sorted(set().union(*found))
            if not classes:
                raise AnnotationError(f"{root}: found no object in {', '.join(names)}")
        masks = data["format"] == "coco" and any(coco.has_masks(root, name) for name in names)
    except DataError as error:
        return Contents([str(error)], [], {})
    chosen = {
        **data,
        "classes": classes,
        "interpolation": "all-point",
        "broken_objects": "drop",
        "empty_images": "keep",
    }
    return contents_of(DetectionData.model_validate(chosen), masks=masks, jobs=jobs)


def render(contents: Contents) -> str:
    """The contents as text for a terminal."""
    lines = []
    for split, counts in contents.counts.items():
        lines.append(f"boxes of {split}: {counts['objects']} in {counts['images']} images")
        classes = [f"{name} {count}" for name, count in counts["classes"].items()]
        lines.append(f"  {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}")
        lines += [f"  {name}: {value}" for name, value in counts.items() if name not in _SHOWN_APART]
    lines += [f"warning: {text}" for text in contents.warnings]
    lines += [f"error: {text}" for text in contents.errors]
    return "\n".join(lines)


def _read(data: DetectionData, *, masks: bool) -> tuple[Annotations, Annotations]:
    names = [*data.train, *data.test]
    if data.format == "coco":
        parts = [coco.read(Path(data.path), name, data.broken_objects, masks) for name in names]
    else:
        assert data.classes is not None
        halves = [name.rpartition("/") for name in names]
        image_sets = [(Path(data.path) / folder, image_set) for folder, _, image_set in halves]
        parts = voc.read_sets(image_sets, data.classes, data.broken_objects)
    try:
        train, test = merge(parts[: len(data.train)]), merge(parts[len(data.train) :])
        require_same_classes(train.classes, test.classes)
    except AnnotationError as error:
        raise AnnotationError(f"{data.path}: {', '.join(names)}: {error}") from None
    try:
        for_training(train, data.empty_images)
    except AnnotationError as error:
        raise AnnotationError(f"{data.path}: {' + '.join(data.train)}: {error}") from None
    if all(image.ignored.all() for image in test.images):
        raise AnnotationError(
            f"{data.path}: found no object in {len(test.images)} test images ({' + '.join(data.test)}; "
            f"{render_counts(test.counts)}): there is nothing to measure, so nothing is trained"
        )
    return train, test


def oddities(train: Annotations, test: Annotations) -> list[str]:
    """Probable mistakes that do not prevent training."""
    texts = alike(set(train.classes))
    for name, split, consequence in (
        ("train", train, "cannot be learnt"),
        ("test", test, "have no average precision"),
    ):
        if split.dropped:
            examples = "; ".join(split.dropped[:3]) + ("; ..." if len(split.dropped) > 3 else "")
            texts.append(f"{len(split.dropped)} objects of {name} are dropped: {examples}")
        objects = split.report()["classes"]
        used = {
            split.classes[label - 1]
            for image in split.images
            for label in image.labels[image.trained if name == "train" else ~image.ignored].tolist()
        }
        for found, missing in (
            ("no object", [each for each, count in objects.items() if not count]),
            (
                "only difficult objects or crowds",
                [each for each, count in objects.items() if count and each not in used],
            ),
        ):
            if missing:
                some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                texts.append(f"{len(missing)} classes have {found} in {name} and {consequence}: {some}")
    shared = {image.path for image in train.images} & {image.path for image in test.images}
    if shared:
        texts.append(f"{len(shared)} images are in both train and test, such as {min(shared)}")
    return texts
