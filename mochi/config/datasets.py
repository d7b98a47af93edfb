"""Where images come from: one section per source.

`prepare` reads a source with the module of the same name in `mochi.data.ingest.sources`: a new source is
that module and a section here.
"""

from typing import Annotated, Literal

from pydantic import Field

from mochi.config.sections import Count, CountOrZero, Name, Real, Section


class Source(Section):
    """Keys of every source."""

    source: str
    """Chooses the section; the module that reads it has this name, with `_` for `-`."""
    name: Name
    """Folder of the prepared data set, below `data/`."""


MaxUnreadable = Annotated[
    Real,
    Field(
        ge=0,
        le=1,
        description="Largest share of files that may be unreadable; they are quarantined.",
    ),
]


MaxSide = Annotated[int, Field(ge=16)]


class PhotoPatches(Source):
    """Patches of the photographs in the packages scikit-image and scikit-learn."""

    source: Literal["photo-patches"]
    """Selects this source."""
    patch_size: Count
    """Side of a patch, pixels."""
    train_per_photo: Count
    """Patches of each photograph to train on."""
    val_per_photo: Count
    """Patches of each photograph to evaluate on, from other cells of it."""
    seed: CountOrZero
    """Seed of the positions of the patches."""


class Folder(Source):
    """Your own images: `path/{train,val}/<class>/*`, `path/<class>/*`, or any tree of unlabelled images."""

    source: Literal["folder"]
    """Selects this source."""
    path: str
    """The folder of images."""
    class_folders: bool = False
    """Without a folder `train`: the folders in `path` are the classes of one split."""
    val_share: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Without a folder `val` or `test`: the share of each class that becomes the split `val`, at least one
    image of two. Which ones is a function of their paths."""
    only_listed: list[str] = []
    """Text files, relative to `path`, with one image per line, as VOC's image sets: its path, its name, or
    its name without suffix. Other images are skipped and counted."""
    max_unreadable: MaxUnreadable = 0.01
    max_side: MaxSide | None = None
    """Longer side of a stored image, pixels; larger images are resized. null: no limit."""


class Download(Source):
    """Keys of every downloaded data set. Contents are verified, whatever their origin."""

    archive: str | None = None
    """The official archive, downloaded by the user; then nothing is downloaded."""
    mirrors: list[str] = []
    """URLs of the archive, tried before the known ones."""


class Cifar(Download):
    """CIFAR (Krizhevsky 2009), binary version; its test images are the split `val`."""

    source: Literal["cifar10", "cifar100"]
    """Selects this source."""


class Stl10(Download):
    """STL-10 (Coates et al. 2011): train includes the unlabelled images; test is the split `val`."""

    source: Literal["stl10"]
    """Selects this source."""


class Imagenette(Download):
    """Ten easy classes of ImageNet (fast.ai), version 2."""

    source: Literal["imagenette"]
    """Selects this source."""
    size: Literal["full", "320px", "160px"]
    """Short side of the images in the archive; full: as in ImageNet."""
    max_unreadable: MaxUnreadable = 0.0
    max_side: MaxSide | None = None
    """Longer side of a stored image, pixels; larger images are resized. null: no limit."""


class ImageNet(Source):
    """ILSVRC 2012 from its official archives or an extracted tree; not downloaded, because of its terms."""

    source: Literal["imagenet"]
    """Selects this source."""
    path: str
    """Contains ILSVRC2012_img_{train,val}.tar or train/<wnid>/, and val/<wnid>/ or the devkit's labels."""
    subset: Literal["all", "imagenet100"]
    """imagenet100: the 100 classes of CMC's list, which MoCHi cites."""
    max_unreadable: MaxUnreadable = 0.0
    max_side: MaxSide | None = None
    """Longer side of a stored image, pixels; larger images are resized. null: no limit."""


Dataset = Annotated[
    PhotoPatches | Folder | Cifar | Stl10 | Imagenette | ImageNet, Field(discriminator="source")
]
