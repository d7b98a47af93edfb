"""Read PASCAL VOC files with all their oddities, and write them.

VOC counts pixels from 1 and its boxes include their last pixel: xmin and ymin lose 1, xmax and ymax stay,
so that (1, 1, W, H) covers the image. A file in which a box starts below 1 counts from 0 and is read so.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from PIL import Image

from mochi.data.ingest.decode import upright_size
from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations, clip
from mochi.storage.atomic import replacing, write_text

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read(root: Path, image_set: str, classes: Sequence[str], broken_objects: str) -> Annotations:
    """Read one image set of a VOC folder.

    Args:
        root: holds Annotations, JPEGImages and ImageSets/Main.
        image_set: for example "trainval".
        classes: names in the order of their labels.
        broken_objects: "drop" (counted) or "fail", for objects without a usable box.

    Raises:
        AnnotationError: a file is missing or unreadable, a class is unknown, or an object is broken and
            `broken_objects` is "fail"; file and object are named.

    Source: VOC2007 and VOC2012 development kits; detectron2 data/datasets/pascal_voc.py for the 1.
    Deviation: a file with a box that starts at 0 loses no 1; broken boxes do not end up in training.
    """
    listing = root / "ImageSets" / "Main" / f"{image_set}.txt"
    try:
        lines = listing.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise AnnotationError(
            f"{listing}: no such file; a VOC folder lists its images there, one name a line"
        ) from None
    # Class-wise lists carry a second column, -1 where the class is absent.
    names = [line.split()[0] for line in lines if line.strip() and line.split()[1:] != ["-1"]]
    if not names:
        raise AnnotationError(f"{listing}: found no image name in it; write one name a line")
    found: Counter[str] = Counter()
    labels = {name: 1 + index for index, name in enumerate(classes)}
    images = tuple(_read_image(root, name, labels, broken_objects, found) for name in names)
    return Annotations(tuple(classes), images, found)


def _read_image(
    root: Path, name: str, class_labels: dict[str, int], broken_objects: str, found: Counter[str]
) -> AnnotatedImage:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ET.parse(path).getroot()  # noqa: S314
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file, though an image set lists {name}") from None
    except ET.ParseError as error:
        raise AnnotationError(f"{path}: is not valid XML: {error}") from None
    image_path = _image_path(root, name, tree.findtext("filename"))
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {number} ({(item.findtext('name') or '').strip()!r})"
        label = class_labels.get((item.findtext("name") or "").strip())
        if label is None:
            raise AnnotationError(
                f"{where}: unknown class; allowed: {', '.join(class_labels)}; add it to `classes`"
            )
        box, defect = _read_box(item)
        if defect or box is None:
            if broken_objects == "fail":
                raise AnnotationError(f"{where}: {defect}; correct the file, or set broken_objects: drop")
            found[f"objects dropped: {defect}"] += 1
            continue
        for tag in ("difficult", "truncated", "pose"):
            found[f"objects without {tag}"] += int(item.find(tag) is None)
        boxes.append(box)
        labels.append(label)
        difficult.append(float(item.findtext("difficult") or 0) != 0)
    width, height = _image_size(image_path)
    stated = (tree.findtext("size/width"), tree.findtext("size/height"))
    if stated != (str(width), str(height)):
        found["files whose size is missing or not the image's"] += 1
    return AnnotatedImage(
        name,
        image_path,
        height,
        width,
        _from_pixels(np.array(boxes, np.float32).reshape(-1, 4), height, width, found),
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.ones(len(labels), bool),
    )


def _read_box(item: ET.Element) -> tuple[list[float] | None, str]:
    """The four numbers as written, and what is wrong with them, if anything."""
    bounds = item.find("bndbox")
    if bounds is None:
        return None, "no bndbox"
    try:
        # VOC2012 itself has fractions: 45.70000076293945 in 2011_003353.
        box = [float(bounds.findtext(side) or "") for side in _SIDES]
    except ValueError:
        return None, "a bndbox without four numbers"
    if not all(math.isfinite(value) for value in box):
        return None, "a bndbox without four numbers"
    if box[2] < box[0] or box[3] < box[1]:
        return None, "a reversed box"
    if box[2] == box[0] or box[3] == box[1]:
        return None, "a box without area"
    return box, ""


def _from_pixels(
    boxes: np.ndarray, height: int, width: int, found: Counter[str]
) -> np.ndarray:  # (n, 4) as written -> continuous
    if len(boxes) and boxes[:, :2].min() < 1:
        found["files counted from 0"] += 1
    else:
        boxes = boxes - np.array([1, 1, 0, 0], np.float32)
    inside = clip(boxes, height, width)
    found["boxes cut to the image"] += int((inside != boxes).any(axis=1).sum())
    return inside


def _image_path(root: Path, name: str, stated: str | None) -> Path:
    """The image of an XML file: by the image set's name, or else by the file's own `filename`."""
    folder = root / "JPEGImages"
    candidates = [folder / f"{name}{suffix}" for suffix in _SUFFIXES]
    if stated:
        candidates.append(folder / Path(stated.strip()).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise AnnotationError(f"{folder / name}: no image of that name; expected one of {', '.join(_SUFFIXES)}")


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone."""
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read as an image: {error}") from None


def write(
    root: Path, image_set: str, annotations: Annotations, truncated: Sequence[Sequence[bool]]
) -> None:
    """Write the XML files and the image set's list; the images are the caller's, in JPEGImages.

    Boxes are rounded outwards to whole pixels, as a person draws them.
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
