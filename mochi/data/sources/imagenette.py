"""Imagenette: ten easily told classes of ImageNet."""

from dataclasses import replace
from pathlib import Path

from torchvision.datasets import Imagenette as Published

from mochi.config import Folder, Imagenette
from mochi.data.fetch import Archive, fetch, unpacked
from mochi.data.origin import Origin
from mochi.data.shards import DataError
from mochi.data.sources import folder

# Addresses and checksums are torchvision's.
ARCHIVES = {size: Archive(Path(url).name, md5, (url,)) for size, (url, md5) in Published._ARCHIVES.items()}
NAMES = {wnid: names[0] for wnid, names in Published._WNID_TO_CLASS.items()}


def collect(config: Imagenette, cache: Path) -> Origin:
    """List both splits; class numbers follow the sorted wnids, names are the words.

    Raises:
        DataError: the archive cannot be had or is another; a class is missing.
    """
    archive = ARCHIVES[config.size]
    root = unpacked(fetch(archive, config, cache), cache) / archive.file.removesuffix(".tgz")
    found = folder.collect(
        Folder(source="folder", name=config.name, path=str(root), max_unreadable=config.max_unreadable),
        cache,
    )
    missing = sorted(set(NAMES) ^ set(found.classes))
    if missing:
        raise DataError(
            f"{root}: classes {', '.join(missing)} are not as in {archive.file}; bring it again"
        )
    return replace(
        found,
        source=f"{archive.urls[0]} (fast.ai)",
        licence="Apache-2.0 for the selection; images of ImageNet: research use; not redistributed",
        classes=[NAMES[wnid] for wnid in found.classes],
    )
