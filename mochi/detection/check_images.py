"""Whether every image of a detection set can be read, asked before anything is computed.

One broken file would otherwise end a training when its turn comes, hours in.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mochi.data.format import UNLABELLED
from mochi.data.ingest.raw import Blob, FileSplit
from mochi.data.ingest.validate import scanning
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations
from mochi.runtime import distributed
from mochi.runtime.progress import counter

_NAMED = 5


def check_images(splits: Sequence[Annotations], root: Path, jobs: int) -> None:
    """Decode every image whole, each rank its share. Verdicts are kept by content in `.cache` beside
    `root`, the set's folder: the next encoder's detection reads the files and decodes nothing.

    Raises:
        AnnotationError: images that do not decode or are not of the annotated size; the first are named.
    """
    distinct = {image.path: image for split in splits for image in split.images}
    images = list(distinct.values())[distributed.rank() :: distributed.world_size()]
    paths = [str(image.path) for image in images]
    files = FileSplit([Blob(path) for path in paths], paths, np.full(len(paths), UNLABELLED))
    report = counter("check images")
    wrong = []
    with _cache(root) as cache, scanning(jobs, cache) as scanner:
        for image, result in zip(images, scanner.scan(files, keep_encoded=False), strict=True):
            report(result.row + 1, len(images))
            if result.verdict.reason:
                wrong.append(f"{image.path} ({result.size} bytes): {result.verdict.reason}")
            elif reason := misfit(image, result.verdict.height, result.verdict.width):
                wrong.append(reason)
    if wrong:
        rest = f"\n  ... and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise AnnotationError(
            f"{len(wrong)} of {len(images)} images cannot be used:\n  "
            + "\n  ".join(wrong[:_NAMED])
            + rest
            + "\nbring them again, or take them out of the image sets"
        )


def misfit(image: AnnotatedImage, height: int, width: int) -> str:
    """What is wrong with an upright image of `height` x `width` pixels; empty if it fits its annotation."""
    if (height, width) == (image.height, image.width):
        return ""
    return (
        f"{image.path}: the image is {width} x {height} pixels upright, its annotation says "
        f"{image.width} x {image.height}; its boxes would be misplaced"
    )


@contextmanager
def _cache(root: Path) -> Iterator[Path]:
    """`.cache` beside the set, or where others' sets may only be read, a folder for this once."""
    beside = root.resolve().parent
    if os.access(beside, os.W_OK):
        yield beside / ".cache"
    else:
        with tempfile.TemporaryDirectory(prefix="mochi-") as folder:
            yield Path(folder)
