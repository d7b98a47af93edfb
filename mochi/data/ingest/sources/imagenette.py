"""Imagenette: ten easy classes of ImageNet."""

from dataclasses import replace
from pathlib import Path

from mochi.config.datasets import Folder, Imagenette
from mochi.data.ingest.fetch import Archive, fetch, unpacked
from mochi.data.ingest.raw import RawDataset
from mochi.data.ingest.sources import folder
from mochi.errors import DataError

_BUCKET = "https://s3.amazonaws.com/fast-ai-imageclas"
# As in torchvision/datasets/imagenette.py, whose import alone takes seconds.
ARCHIVES = {
    size: Archive(file, md5, (f"{_BUCKET}/{file}",))
    for size, file, md5 in (
        ("full", "imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
        ("320px", "imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
        ("160px", "imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    )
}
NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def collect(config: Imagenette, cache: Path) -> RawDataset:
    """List both splits; class numbers follow the sorted wnids, names are the words.

    Raises:
        DataError: the archive cannot be downloaded, is another file, or lacks a class.
    """
    archive = ARCHIVES[config.size]
    root = unpacked(fetch(archive, config, cache), cache) / archive.file.removesuffix(".tgz")
    raw = folder.list_images(
        Folder(
            source="folder",
            name=config.name,
            path=str(root),
            max_unreadable=config.max_unreadable,
            max_side=config.max_side,
        )
    )
    missing = sorted(set(NAMES) ^ set(raw.classes))
    if missing:
        raise DataError(
            f"{root}: classes {', '.join(missing)} are not as in {archive.file}; download it again"
        )
    return replace(
        raw,
        source=f"{archive.urls[0]} (fast.ai)",
        licence="Apache-2.0 for the selection; images of ImageNet: research use; not redistributed",
        classes=[NAMES[wnid] for wnid in raw.classes],
    )
