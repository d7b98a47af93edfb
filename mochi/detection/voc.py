"""Read and write PASCAL VOC files.

VOC counts pixels from 1 and its boxes include their last pixel: 1 is subtracted from xmin and ymin only,
so that (1, 1, W, H) covers the image. A set in which a box starts at 0 is 0-based, in all its files.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from mochi.data.ingest.decode import UnreadableError, image_size
from mochi.data.ingest.files import IMAGE_SUFFIXES, Names, read_list
from mochi.detection.annotations import (
    AnnotatedImage,
    AnnotationError,
    Annotations,
    Mistakes,
    clip,
    count_cut,
    drop,
)
from mochi.storage.atomic import replacing, write_text
from mochi.text import as_number, nfc, read_xml, shown

logger = logging.getLogger(__name__)

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_TAGS = {
    ".": ("object", "size", "filename"),
    "size": ("width", "height"),
    "object": ("name", "bndbox", "difficult"),
    "object/bndbox": _SIDES,
}
"""Path of an element -> the tags in it that decide what is read."""


def read(root: Path, image_set: str, classes: Sequence[str], broken_objects: str) -> Annotations:
    """Read one image set of a VOC folder as a separate data set. Raises as `read_sets`."""
    return read_sets([(root, image_set)], classes, broken_objects)[0]


def read_sets(
    sets: Sequence[tuple[Path, str]], classes: Sequence[str], broken_objects: str
) -> list[Annotations]:
    """Read the image sets of one data set. Whether it is 0-based or 1-based is decided for all of them.

    Args:
        sets: folders with Annotations, JPEGImages and ImageSets/Main, and names such as "trainval".
        classes: names in the order of their labels.
        broken_objects: "drop" (counted) or "fail", for objects without a usable box.

    Raises:
        AnnotationError: a file is missing or unreadable or contradicts its image, a class is unknown, or
            an object is broken and `broken_objects` is "fail"; the message lists the first few files and
            objects.

    Source: VOC2007 and VOC2012 development kits; detectron2 data/datasets/pascal_voc.py for the 1.
    Deviation: 1 is not subtracted in a set with a box that starts at 0; broken boxes are not trained on.
    """
    classes = [nfc(name) for name in classes]
    labels = {name: 1 + index for index, name in enumerate(classes)}
    if len(labels) < len(classes):
        raise AnnotationError(f"classes: found {', '.join(classes)}; two are one name in two Unicode forms")
    mistakes, counts_by_set, dropped_by_set = (
        Mistakes(),
        [Counter[str]() for _ in sets],
        [list[str]() for _ in sets],
    )
    files: list[list[_File]] = []
    for (root, image_set), counts, dropped in zip(sets, counts_by_set, dropped_by_set, strict=True):
        reader = _Reader(root, labels, broken_objects, counts, dropped, mistakes)
        files.append(reader.files(image_set))
    mistakes.refuse()
    boxes = [each.box for part in files for file in part for each in file.objects]
    low = sum(0 <= min(box[:2]) < 1 for box in boxes)
    first = 0 if low else 1
    numbering = f"pixels counted from {first}: {low} of {len(boxes)} boxes start at 0"
    logger.info("%s: %s", sets[0][0], numbering)
    splits = []
    for part, counts, dropped in zip(files, counts_by_set, dropped_by_set, strict=True):
        images = []
        for file in part:
            with mistakes.collected():
                images.append(file.annotated(first, broken_objects, counts, dropped))
        if first == 0:
            counts["files counted from 0"] += len(part)
        splits.append((images, counts, dropped))
    mistakes.refuse()
    return [
        Annotations(tuple(classes), tuple(images), counts, numbering, tuple(dropped))
        for images, counts, dropped in splits
    ]


def class_names(root: Path, image_set: str) -> Counter[str]:
    """Number of objects of each name in an image set.

    Raises:
        AnnotationError: a file is missing or not XML, or an object has no name.
    """
    names: Counter[str] = Counter()
    annotations = Names(root / "Annotations")
    for name in _listed(root, image_set, annotations):
        path, _, items = _objects(annotations, name)
        names.update(_name(item, f"{path}: object {number}") for number, item in enumerate(items, start=1))
    return names


@dataclass(frozen=True)
class _Object:
    where: str
    label: int
    box: list[float]
    """As written."""
    difficult: bool


@dataclass(frozen=True)
class _File:
    """One XML file with its image."""

    name: str
    image: Path
    width: int
    height: int
    objects: list[_Object]

    def annotated(
        self, first: int, broken_objects: str, counts: Counter[str], dropped: list[str]
    ) -> AnnotatedImage:
        """The boxes of the file in continuous coordinates, with pixels counted from `first`."""
        written = np.array([each.box for each in self.objects], np.float64).reshape(-1, 4)
        boxes = written - np.array([first, first, 0, 0])
        inside = clip(boxes, self.height, self.width)
        usable: NDArray[np.bool_] = np.all(inside[:, 2:] > inside[:, :2], axis=1)
        for each, fine in zip(self.objects, usable, strict=True):
            if not fine:
                drop(each.where, "a box outside the image", broken_objects, counts, dropped)
        count_cut(boxes[usable], self.height, self.width, counts)
        kept = [each for each, fine in zip(self.objects, usable, strict=True) if fine]
        return AnnotatedImage(
            self.name,
            self.image,
            self.height,
            self.width,
            inside[usable],
            np.array([each.label for each in kept], np.int64),
            np.array([each.difficult for each in kept], bool),
            np.ones(len(kept), bool),
        )


class _Reader:
    """Reads the XML files of one folder."""

    def __init__(
        self,
        root: Path,
        labels: dict[str, int],
        broken_objects: str,
        counts: Counter[str],
        dropped: list[str],
        mistakes: Mistakes,
    ) -> None:
        self._root, self._labels, self._broken_objects = root, labels, broken_objects
        self._counts, self._dropped, self._mistakes = counts, dropped, mistakes
        self._annotations, self._images = Names(root / "Annotations"), Names(root / "JPEGImages")

    def files(self, image_set: str) -> list[_File]:
        """The files that an image set lists; mistakes are collected."""
        listed = _listed(self._root, image_set, self._annotations)
        names = list(dict.fromkeys(listed))
        if len(names) < len(listed):
            self._counts["names listed twice"] += len(listed) - len(names)
        files = []
        for name in names:
            with self._mistakes.collected():
                files.append(self._file(name))
        return files

    def _file(self, name: str) -> _File:
        path, tree, items = _objects(self._annotations, name)
        image = self._image(name, tree.findtext("filename"))
        try:
            width, height = image_size(image)
        except UnreadableError as error:
            raise AnnotationError(f"{image}: cannot be read as an image: {error}") from None
        self._check_size(path, tree, image, width, height)
        objects = [
            item
            for number, element in enumerate(items, start=1)
            if (item := self._object(element, f"{path}: object {number}"))
        ]
        return _File(name, image, width, height, objects)

    def _image(self, name: str, stated: str | None) -> Path:
        """The image of an XML file: the one with the image set's name, otherwise the one in `filename`.

        If several images have that name and differ in suffix, `filename` chooses. A `filename` with another
        name is ignored then: it is often the name before renaming, and may now belong to another image.
        """
        stated = (stated or "").strip().replace("\\", "/").rpartition("/")[2]
        named = self._images.find(stated) if stated else None
        image = self._images.image(name)
        if image is None or (named is not None and named.with_suffix("") == image.with_suffix("")):
            image = named
        if image is not None and not image.is_file():
            raise AnnotationError(f"{image}: a broken link, or not a regular file; expected the image")
        if image is None:
            raise AnnotationError(
                f"{self._images.folder / name}: no image of that name{self._images.alike(name)}; "
                f"expected one of {', '.join(IMAGE_SUFFIXES)}"
            )
        return image

    def _check_size(self, path: Path, tree: ET.Element, image: Path, width: int, height: int) -> None:
        """Refuse other image sizes, such as that before resizing or rotation: boxes would be misplaced."""
        stated = []
        for tag in ("width", "height"):
            text = (tree.findtext(f"size/{tag}") or "").strip()
            number = as_number(text or "0")
            if number is None or number < 0 or number != int(number):
                raise AnnotationError(
                    f"{path}: size/{tag}: found {shown(text)}; expected a number of pixels"
                )
            stated.append(int(number))
        if 0 in stated:
            self._counts["files whose size is missing"] += 1
        elif stated != [width, height]:
            turned = " (the sides swapped, as by an EXIF orientation)" if stated == [height, width] else ""
            raise AnnotationError(
                f"{path}: size: found {stated[0]} x {stated[1]}{turned}; {image.name} is {width} x "
                f"{height} pixels upright; its boxes would be misplaced: correct the size and the boxes, "
                "or replace the image"
            )

    def _object(self, item: ET.Element, where: str) -> _Object | None:
        name = _name(item, where)
        where = f"{where} ({shown(name)})"
        label = self._labels.get(name)
        if label is None:
            alike = [known for known in self._labels if known.casefold() == name.casefold()]
            hint = f"; {alike[0]!r} differs only in case" if alike else ""
            raise AnnotationError(
                f"{where}: unknown class{hint}; allowed: {', '.join(self._labels)}; add it to `classes`"
            )
        for tag in ("name", "bndbox", "difficult"):
            if len(item.findall(tag)) > 1:
                raise AnnotationError(f"{where}: found <{tag}> twice; expected one: remove the wrong one")
        box, defect = _read_box(item)
        if defect or box is None:
            drop(where, defect, self._broken_objects, self._counts, self._dropped)
            return None
        for tag in ("difficult", "truncated", "pose"):
            self._counts[f"objects without {tag}"] += int(item.find(tag) is None)
        difficult = (item.findtext("difficult") or "").strip().lower() or "0"
        number = {"true": 1.0, "false": 0.0}.get(difficult, as_number(difficult))
        if number not in {0.0, 1.0}:
            raise AnnotationError(f"{where}: difficult: found {shown(difficult)}; expected 0 or 1")
        return _Object(where, label, box, number != 0)


def _listed(root: Path, image_set: str, annotations: Names) -> list[str]:
    listing = root / "ImageSets" / "Main" / f"{image_set}.txt"
    names = read_list(listing, lambda line: annotations.find(f"{line}.xml") is not None)
    if not names:
        raise AnnotationError(f"{listing}: found no image name in it; write one name a line")
    return names


def _objects(annotations: Names, name: str) -> tuple[Path, ET.Element, list[ET.Element]]:
    """The XML file of a name, its root and its objects, without parts of persons."""
    path = annotations.find(f"{name}.xml")
    if path is None:
        raise AnnotationError(
            f"{annotations.folder}: found no {shown(f'{name}.xml')}{annotations.alike(name)}; an image set "
            f"lists {shown(name)}; expected the name of an image, without suffix, on each of its lines"
        )
    tree = read_xml(path, "the objects of an image")
    if tree.tag != "annotation":
        raise AnnotationError(f"{path}: found <{tree.tag}> as its root; expected <annotation>")
    for parent, tags in _TAGS.items():
        for element in tree.iterfind(f"{parent}/*"):
            if element.tag not in tags and element.tag.lower() in tags:
                raise AnnotationError(
                    f"{path}: found <{element.tag}>; expected <{element.tag.lower()}>: correct the tag"
                )
    items = tree.findall("object")
    elsewhere = sum(each.tag.lower() == "object" for each in tree.iter()) - len(items)
    if elsewhere:
        raise AnnotationError(
            f"{path}: found {elsewhere} <object> deeper in the file (looked for <object> directly below "
            "<annotation>); move them there"
        )
    return path, tree, items


def _name(item: ET.Element, where: str) -> str:
    name = nfc((item.findtext("name") or "").strip())
    if not name:
        raise AnnotationError(f"{where}: found no name; expected the class of the object")
    return name


def _read_box(item: ET.Element) -> tuple[list[float] | None, str]:
    """The four numbers as written, and their defect, if any."""
    bounds = item.find("bndbox")
    if bounds is None:
        return None, "no bndbox"
    # VOC2012 itself has fractions: 45.70000076293945 in 2011_003353.
    if any(len(bounds.findall(side)) > 1 for side in _SIDES):
        return None, "a bndbox with a side twice"
    numbers = [as_number(bounds.findtext(side)) for side in _SIDES]
    box = [number for number in numbers if number is not None]
    if len(box) != len(_SIDES):
        return None, "a bndbox without four numbers"
    if box[2] < box[0] or box[3] < box[1]:
        return None, "a reversed box"
    if box[2] == box[0] or box[3] == box[1]:
        return None, "a box without area"
    return box, ""


def write(
    root: Path, image_set: str, annotations: Annotations, truncated: Sequence[Sequence[bool]]
) -> None:
    """Write the XML files and the image set's list; the caller writes the images to JPEGImages.

    Boxes are rounded outwards to whole pixels, like manual annotations.
    """
    for image, cut in zip(annotations.images, truncated, strict=True):
        tree = ET.Element("annotation")
        _text(tree, "folder", root.name)
        _text(tree, "filename", image.path.name)
        size = ET.SubElement(tree, "size")
        for tag, value in (("width", image.width), ("height", image.height), ("depth", 3)):
            _text(size, tag, str(value))
        _text(tree, "segmented", "0")
        for index, (box, label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            item = ET.SubElement(tree, "object")
            _text(item, "name", annotations.classes[label - 1])
            _text(item, "pose", "Unspecified")
            _text(item, "truncated", str(int(cut[index])))
            _text(item, "difficult", str(int(image.ignored[index])))
            bounds = ET.SubElement(item, "bndbox")
            corners = (math.floor(box[0]) + 1, math.floor(box[1]) + 1, math.ceil(box[2]), math.ceil(box[3]))
            for side, corner in zip(_SIDES, corners, strict=True):
                _text(bounds, side, str(corner))
        ET.indent(tree)
        with replacing(root / "Annotations" / f"{image.path.stem}.xml") as temporary:
            ET.ElementTree(tree).write(temporary, encoding="utf-8")
    names = "".join(f"{image.path.stem}\n" for image in annotations.images)
    write_text(root / "ImageSets" / "Main" / f"{image_set}.txt", names)


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
