"""Where images come from: a section for each source."""

from typing import Annotated, Literal

from pydantic import Field

from mochi.config.sections import Count, CountOrZero, Name, Real, Section


class PhotoPatches(Section):
    """Patches of the photographs that scikit-image and scikit-learn carry (design: embedded data)."""

    source: Literal["photo-patches"]
    name: Name
    patch_size: Count
    """Side of a patch, pixels."""
    train_per_photo: Count
    val_per_photo: Count
    seed: CountOrZero


class Folder(Section):
    """Your own images: `path/{train,val}/<class>/*`, or any tree of unlabelled images."""

    source: Literal["folder"]
    name: Name
    path: str
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.01
    """Largest share of files that may be set aside as unreadable before preparation refuses."""


class Download(Section):
    """What every downloaded data set shares. Contents are checked whatever they come from."""

    name: Name
    archive: str | None = None
    """The official archive, brought by hand: nothing is downloaded."""
    mirrors: list[str] = []
    """Addresses of the archive, tried before the known ones."""


class Cifar(Download):
    """CIFAR (Krizhevsky 2009), binary version; its test images are the split `val`."""

    source: Literal["cifar10", "cifar100"]


class Stl10(Download):
    """STL-10 (Coates et al. 2011): train holds the unlabelled images too; test is the split `val`."""

    source: Literal["stl10"]


class Imagenette(Download):
    """Ten easy classes of ImageNet (fast.ai), version 2."""

    source: Literal["imagenette"]
    size: Literal["full", "320px", "160px"]
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class ImageNet(Section):
    """ILSVRC 2012 from its official archives or an extracted tree; never downloaded, by its terms."""

    source: Literal["imagenet"]
    name: Name
    path: str
    """Holds ILSVRC2012_img_{train,val}.tar or train/<wnid>/, and val/<wnid>/ or the devkit's labels."""
    subset: Literal["all", "imagenet100"]
    """imagenet100: the 100 classes of CMC's list, which MoCHi cites."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class Voc(Section):
    """PASCAL VOC in place: images are checked and listed, never copied."""

    source: Literal["voc"]
    name: Name
    path: str
    """Holds VOC2007/ and VOC2012/, each with JPEGImages, Annotations and ImageSets/Main."""
    years: Annotated[list[str], Field(min_length=1)]
    """Folders below `path`, for example VOC2007."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class Coco(Section):
    """COCO in place: images are checked and listed, never copied."""

    source: Literal["coco"]
    name: Name
    path: str
    """Holds annotations/instances_<split>.json and <split>/."""
    splits: Annotated[list[Name], Field(min_length=1)]
    """For example train2017, val2017."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


Dataset = Annotated[
    PhotoPatches | Folder | Cifar | Stl10 | Imagenette | ImageNet | Voc | Coco,
    Field(discriminator="source"),
]
