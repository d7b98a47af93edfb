"""PASCAL VOC in place: which images there are, and whether each can be read. Boxes belong to detection."""

from pathlib import Path

import numpy as np

from mochi.config import Voc
from mochi.data.origin import ArraySplit, Blob, FileSplit, Origin
from mochi.data.shards import UNLABELLED, DataError

_SETS = ("train", "val", "trainval", "test")


def collect(config: Voc, cache: Path) -> Origin:
    """One split for each image set of each year, such as `VOC2007-trainval`, as listed in ImageSets/Main.

    Raises:
        DataError: a year or its image sets are missing.
    """
    del cache
    splits: dict[str, ArraySplit | FileSplit] = {}
    for year in config.years:
        root = Path(config.path) / year
        listings = {name: root / "ImageSets" / "Main" / f"{name}.txt" for name in _SETS}
        if listings["trainval"].is_file():
            del listings["train"], listings["val"]  # its two parts
        for name, listing in listings.items():
            if listing.is_file():
                splits[f"{year}-{name}"] = _split(root, listing)
        if not any(split.startswith(f"{year}-") for split in splits):
            raise DataError(f"{root}: no ImageSets/Main/{{train,val,trainval,test}}.txt in it")
    return Origin(
        source="PASCAL VOC (Everingham et al. 2010)",
        licence="Flickr images under Flickr's terms of use: research, not redistributed",
        classes=[],
        splits=splits,
        max_unreadable=config.max_unreadable,
        in_place=True,
    )


def _split(root: Path, listing: Path) -> FileSplit:
    names = [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    paths = [f"{root.name}/JPEGImages/{name}.jpg" for name in names]
    blobs = [Blob(str(root.parent / path)) for path in paths]
    return FileSplit(blobs, paths, np.full(len(paths), UNLABELLED))
