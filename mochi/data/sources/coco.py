"""COCO in place: which images there are, and whether each can be read. Boxes belong to detection."""

import json
from pathlib import Path

import numpy as np

from mochi.config import Coco
from mochi.data.origin import Blob, FileSplit, Origin
from mochi.data.shards import UNLABELLED, DataError


def collect(config: Coco, cache: Path) -> Origin:
    """One split for each annotation file, its images in the file's order.

    Raises:
        DataError: an annotation file is missing or is not COCO's.
    """
    del cache
    root = Path(config.path)
    return Origin(
        source="COCO 2017 (Lin et al. 2014)",
        licence="annotations CC BY 4.0; each image has its own Flickr licence: not redistributed",
        classes=[],
        splits={split: _split(root, split) for split in config.splits},
        max_unreadable=config.max_unreadable,
        in_place=True,
    )


def _split(root: Path, split: str) -> FileSplit:
    path = root / "annotations" / f"instances_{split}.json"
    try:
        names = [image["file_name"] for image in json.loads(path.read_text(encoding="utf-8"))["images"]]
    except FileNotFoundError:
        raise DataError(f"{path}: not found; expected COCO's annotations/ beside {split}/") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is not a COCO annotation file: {error!r}") from None
    paths = [f"{split}/{name}" for name in names]
    blobs = [Blob(str(root / name)) for name in paths]
    return FileSplit(blobs, paths, np.full(len(paths), UNLABELLED))
