"""Check every image of a detection set before anything is computed.

Otherwise a corrupt file would end training when it is first read, possibly after hours.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faster_coco_eval.core import mask as mask_api

from mochi.data.format import UNLABELLED
from mochi.data.ingest.decode import open_image
from mochi.data.ingest.files import Names
from mochi.data.ingest.raw import ByteRange, FileSplit
from mochi.data.ingest.validate import Validator
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations
from mochi.runtime import distributed
from mochi.runtime.progress import counter

logger = logging.getLogger(__name__)

_SHOWN = 5
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 2 to 8 flip or rotate, 5 to 8 swap width and height


def check_images(splits: Sequence[Annotations], jobs: int) -> None:
    """Decode every image completely, divided over ranks.

    Logged: images of several splits with the same content, turned images whose size does not show it.

    Raises:
        AnnotationError: images that are missing, do not decode or are not of the annotated size; the
            message lists the first. Or all boxes of a split are smaller than a pixel, or no mask is in its
            box.
    """
    for split in splits:
        _refuse_relative(split)
        _warn_of_repetition(split)
        _warn_of_corners(split)
        _check_masks(split)
    distinct = {(each.path, each.height, each.width): each for split in splits for each in split.images}
    images = list(distinct.values())[distributed.rank() :: distributed.world_size()]
    split_of = {image.path: number for number, split in enumerate(splits) for image in split.images}
    first, shared = dict[bytes, Path](), list[tuple[Path, Path]]()
    present, wrong, turned = list[AnnotatedImage](), list[str](), list[Path]()
    unsized = any(split.counts["files whose size is missing"] for split in splits)
    for image in images:
        if os.path.isfile(image.path):  # noqa: PTH113 (a Path raises where it may not look)
            present.append(image)
        else:  # also pipes and devices, whose data may never end
            alike = Names(image.path.parent).alike(image.path.name)
            wrong.append(
                f"{image.path}: found no regular file{alike}; it is image {image.image_id!r} of its set"
            )
    paths = [str(image.path) for image in present]
    files = FileSplit([ByteRange(path) for path in paths], paths, np.full(len(paths), UNLABELLED))
    report = counter("check images")
    with Validator(jobs) as validator:
        for image, file in zip(present, validator.validate(files, keep_reencoded=False), strict=True):
            report(file.row + 1, len(present))
            if file.result.reason:
                wrong.append(f"{image.path} ({file.size} bytes): {file.result.reason}")
            elif reason := misfit(image, file.result.height, file.result.width):
                wrong.append(reason)
            elif split_of[other := first.setdefault(file.sha256, image.path)] != split_of[image.path]:
                shared.append((other, image.path))
            if file.result.reencoded is not None and _hides_its_frame(image, unsized):
                turned.append(image.path)
    if turned:
        logger.warning(
            "%d images are turned or mirrored by EXIF, which their annotated size does not show, such as "
            "%s: their boxes are read as those of the upright picture",
            len(turned), turned[0],
        )  # fmt: skip
    if shared:
        logger.warning(
            "%d images have the same content as one of another split, such as %s and %s: the average "
            "precision is too high; keep each in one split",
            len(shared), *shared[0],
        )  # fmt: skip
    if wrong:
        rest = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise AnnotationError(
            f"{len(wrong)} of {len(images)} images cannot be used:\n  "
            + "\n  ".join(wrong[:_SHOWN])
            + rest
            + "\nreplace them, or remove them from the image sets"
        )


def _refuse_relative(split: Annotations) -> None:
    sides = [image.boxes[:, 2:] - image.boxes[:, :2] for image in split.images]
    boxes = sum(map(len, sides))
    if boxes and all((side <= 1).all() for side in sides):
        path = next(image.path for image, side in zip(split.images, sides, strict=True) if len(side))
        raise AnnotationError(
            f"{path}: found no box larger than a pixel, here and in the {boxes} boxes of its set; expected "
            "pixels, not shares of the image's width and height"
        )


def _warn_of_repetition(split: Annotations) -> None:
    """Image sets overlap: train and trainval, or one that is named twice."""
    times = Counter(image.path for image in split.images)
    if several := [path for path, count in times.items() if count > 1]:
        logger.warning(
            "%d images are in several image sets of one split, such as %s, and count each time: name sets "
            "that share no image",
            len(several), several[0],
        )  # fmt: skip


def _warn_of_corners(split: Annotations) -> None:
    """COCO's boxes, if they are [x0, y0, x1, y1] and read as [x, y, width, height], end at the border."""
    images = [image for image in split.images if image.areas is not None and len(image.boxes)]
    at_border = [(image.boxes[:, 2:] == (image.width, image.height)).any(axis=1) for image in images]
    boxes, cut = sum(map(len, at_border)), sum(int(each.sum()) for each in at_border)
    if 2 * cut > boxes:
        logger.warning(
            "%s: %d of the %d boxes of its set reach the right or lower border of their images; expected "
            "[x, y, width, height] as bbox: [x0, y0, x1, y1] would be read wrongly",
            images[0].path, cut, boxes,
        )  # fmt: skip


def _hides_its_frame(image: AnnotatedImage, unsized: bool) -> bool:
    """Whether an orientation tag changes the picture, but not the size that was compared."""
    try:
        tag = open_image(image.path.read_bytes()).getexif().get(_ORIENTATION, 1)
    except Exception:
        # Pillow's readers of metadata raise many types; without metadata a picture is upright.
        return False
    return 2 <= tag <= 4 or (5 <= tag <= 8 and (unsized or image.height == image.width))


def _check_masks(split: Annotations) -> None:
    """Warn of masks without a pixel in their box.

    Raises:
        AnnotationError: all masks are such.
    """
    masks, apart = 0, list[str]()
    for image in split.images:
        if not image.masks:
            continue
        found = np.array(mask_api.toBbox(list(image.masks)), np.float64).reshape(-1, 4)
        low = np.maximum(found[:, :2], image.boxes[:, :2])
        high = np.minimum(found[:, :2] + found[:, 2:], image.boxes[:, 2:])
        numbers = np.flatnonzero((high <= low).any(axis=1)) + 1
        masks += len(found)
        apart += [f"{image.path}: mask {number} of {len(found)}" for number in numbers.tolist()]
    if not apart:
        return
    text = (
        f"{apart[0]}: found no pixel of it in its box, as for {len(apart)} of the {masks} masks of its set"
    )
    if len(apart) == masks:
        raise AnnotationError(f"{text}; expected pixels, in the order x, y")
    logger.warning("%s; correct or remove them", text)


def misfit(image: AnnotatedImage, height: int, width: int) -> str:
    """How an upright image of `height` x `width` pixels differs from its annotation; empty if it fits."""
    if (height, width) == (image.height, image.width):
        return ""
    return (
        f"{image.path}: the image is {width} x {height} pixels upright, its annotation says "
        f"{image.width} x {image.height}; its boxes would be misplaced"
    )
