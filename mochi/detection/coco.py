"""Read and write COCO's instances JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api

from mochi.data.ingest.decode import MAX_PIXELS
from mochi.data.ingest.files import Names
from mochi.detection.annotations import (
    AnnotatedImage,
    AnnotationError,
    Annotations,
    Mistakes,
    RunLengths,
    clip,
    count_cut,
    drop,
)
from mochi.storage.atomic import write_json
from mochi.text import Fields, as_number, nfc, read_json

_Id = int | str
_FAR = 1e9
"""Pixels; beyond any image."""


def read(root: Path, split: str, broken_objects: str, masks: bool) -> Annotations:
    """Read `root/annotations/instances_<split>.json`; images are in `root/<split>`.

    Categories become labels 1 to K in the order of their ids, without gaps. Crowds are kept for evaluation
    (ignored there) and never trained on. Ids may be numbers or strings.

    Args:
        root: the data set's folder.
        split: for example "train2017".
        broken_objects: "drop" (counted) or "fail", for objects without a usable box, and, with `masks`,
            without a usable segmentation.
        masks: read segmentations (polygons, compressed and uncompressed run lengths).

    Raises:
        AnnotationError: the file is missing or not COCO's, an id is used twice, an object names an
            unknown image or category, a field is malformed, or an object is broken and `broken_objects` is
            "fail". The first few mistakes are reported together.
    """
    path = root / "annotations" / f"instances_{split}.json"
    data = Fields.of(read_json(path, "COCO's instances format"), str(path))
    if missing := [key for key in ("images", "annotations", "categories") if key not in data.values]:
        raise AnnotationError(f"{path}: found no {', '.join(missing)}; expected COCO's instances format")
    classes = _categories(data)
    labels = {identity: 1 + index for index, identity in enumerate(classes)}
    mistakes, counts = Mistakes(), Counter[str]()
    images = _images(data, root / split, mistakes)
    mistakes.refuse()
    objects: dict[_Id, list[_Object]] = {identity: [] for identity in images}
    seen: set[_Id] = set()
    known = f"a category: {_some(labels)}"
    for index, value in enumerate(data.items("annotations")):
        with mistakes.collected():
            item = _Object(path, index, value)
            if item.identity in seen:
                raise AnnotationError(f"{item.where}: found this id twice; expected ids that are unique")
            seen.add(item.identity)
            image_id = item.reference("image_id", images, "among the images")
            item.reference("category_id", labels, known)
            objects[image_id].append(item)
    mistakes.refuse()
    annotated, dropped = [], list[str]()
    for identity, image in images.items():
        with mistakes.collected():
            annotated.append(
                image.annotated(objects[identity], labels, masks, broken_objects, counts, dropped)
            )
    mistakes.refuse()
    ids = list(labels)
    numbering = f"category ids {ids[0]!r} to {ids[-1]!r}"
    return Annotations(tuple(classes.values()), tuple(annotated), counts, numbering, tuple(dropped))


def has_masks(root: Path, split: str) -> bool:
    """Whether any object of a split has a segmentation.

    Raises:
        AnnotationError: the file is missing or not JSON.
    """
    content = read_json(root / "annotations" / f"instances_{split}.json", "COCO's instances format")
    items = content.get("annotations") if isinstance(content, dict) else None
    items = items if isinstance(items, list) else []
    return any(isinstance(item, dict) and bool(item.get("segmentation")) for item in items)


def _categories(data: Fields) -> dict[_Id, str]:
    """Id -> name, in the order of the ids: numbers first."""
    names: dict[_Id, str] = {}
    for category in data.objects("categories"):
        identity, name = category.identity("id"), nfc(category.text("name").strip())
        if identity in names:
            raise AnnotationError(
                f"{category.where}: id: found {identity!r} twice, for {names[identity]!r} and {name!r}"
            )
        if name in names.values():
            raise AnnotationError(
                f"{category.where}: name: found {name!r} twice; expected names that differ"
            )
        names[identity] = name
    if not names:
        raise AnnotationError(f"{data.where}: categories: found none; expected the classes of the objects")
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


class _Image:
    """An entry of `images`."""

    def __init__(self, fields: Fields, names: Names) -> None:
        self.identity = fields.identity("id")
        stated = fields.text("file_name")
        found = names.find(stated) or names.find(stated.replace("\\", "/"))
        self.path = found or names.folder / stated
        self.height, self.width = (fields.integer(key, at_least=1) for key in ("height", "width"))
        if self.height * self.width > MAX_PIXELS:
            raise AnnotationError(
                f"{fields.where}: found {self.width} x {self.height} pixels; at most {MAX_PIXELS} are read"
            )

    def annotated(
        self,
        objects: Sequence["_Object"],
        labels: Mapping[_Id, int],
        masks: bool,
        broken_objects: str,
        counts: Counter[str],
        dropped: list[str],
    ) -> AnnotatedImage:
        """The image with its usable objects."""
        kept, shapes = [], []
        for item in objects:
            shape, defect = item.usable(self.height, self.width, masks)
            if defect:
                drop(f"{item.where} of image {self.identity!r}", defect, broken_objects, counts, dropped)
                continue
            kept.append(item)
            shapes.append(shape)
        boxes = np.array([item.box for item in kept], np.float64).reshape(-1, 4)
        areas = [item.area() for item in kept]
        crowd = np.array([item.fields.flag("iscrowd") for item in kept], bool)
        boxes[:, 2:] += boxes[:, :2]
        count_cut(boxes, self.height, self.width, counts)
        counts["crowds"] += int(crowd.sum())
        counts["images without boxes"] += int(not kept)
        counts["images with crowds alone"] += int(len(kept) > 0 and bool(crowd.all()))
        return AnnotatedImage(
            self.identity,
            self.path,
            self.height,
            self.width,
            clip(boxes, self.height, self.width),
            np.array([labels[item.category] for item in kept], np.int64),
            crowd,
            ~crowd,
            tuple(shape for shape in shapes if shape is not None) if masks else None,
            np.array(areas, np.float64),
        )


def _images(data: Fields, folder: Path, mistakes: Mistakes) -> dict[_Id, _Image]:
    """Id -> image; ids and files must be unique."""
    names, images, files = Names(folder), dict[_Id, _Image](), dict[Path, _Id]()
    for index, value in enumerate(data.items("images")):
        with mistakes.collected():
            where = f"{data.where}: images[{index}]"
            image = _Image(Fields.of(value, where), names)
            if other := images.get(image.identity):
                raise AnnotationError(
                    f"{where}: id {image.identity!r} stands for both {other.path.name} and "
                    f"{image.path.name}; expected ids that are unique"
                )
            if image.path in files:
                raise AnnotationError(
                    f"{where}: file_name: {image.path.name} is also image {files[image.path]!r}; "
                    "expected each file once, with all its objects"
                )
            images[image.identity], files[image.path] = image, image.identity
    return images


class _Object:
    """An entry of `annotations`."""

    def __init__(self, path: Path, index: int, value: object) -> None:
        self.fields = Fields.of(value, f"{path}: annotations[{index}]")
        # Some programs write annotations without ids, and nothing refers to them.
        self.identity: _Id = self.fields.identity("id") if "id" in self.fields.values else f"[{index}]"
        self.where = f"{path}: annotation {self.identity}"
        self.fields = Fields(self.where, self.fields.values)
        self.box: list[float] = []
        self.category: _Id = 0

    def reference(self, key: str, known: Mapping[_Id, object], expected: str) -> _Id:
        """An id that refers to another part of the file."""
        identity = self.fields.identity(key)
        if identity not in known:
            raise AnnotationError(f"{self.where}: {key} {identity!r} is not {expected}")
        if key == "category_id":
            self.category = identity
        return identity

    def usable(self, height: int, width: int, masks: bool) -> tuple[RunLengths | None, str]:
        """The mask, if requested, and the defect of an unusable object, if any."""
        box = self.fields.values.get("bbox")
        numbers = [as_number(value) for value in box] if isinstance(box, list) else []
        self.box = [number for number in numbers if number is not None]
        if not len(self.box) == len(numbers) == 4:
            return None, "a bbox that is not four numbers" if numbers else "no bbox"
        x, y, w, h = self.box
        if w <= 0 or h <= 0:
            return None, "a box without area"
        if max(abs(x), abs(y), w, h) > _FAR:
            return None, "a box outside the image"
        # In the precision of the boxes, where a thousandth of a pixel may round to zero.
        if not (_extent(x, x + w, width) > 0 and _extent(y, y + h, height) > 0):
            return None, "a box outside the image"
        if not masks:
            return None, ""
        shape = usable_mask(self.fields.values.get("segmentation"), height, width)
        return (None, shape) if isinstance(shape, str) else (shape, "")

    def area(self) -> float:
        """COCO's area; that of the box if it is missing."""
        if "area" not in self.fields.values:
            return self.box[2] * self.box[3]
        return self.fields.number("area", at_least=0)


def _extent(low: float, high: float, side: int) -> float:
    """Length of an interval clipped to [0, side]."""
    return float(np.float32(min(max(high, 0.0), side)) - np.float32(min(max(low, 0.0), side)))


def _some(ids: Mapping[_Id, object]) -> str:
    shown_ids = ", ".join(str(identity) for identity in list(ids)[:10])
    return f"{shown_ids}{', ...' if len(ids) > 10 else ''}"


def usable_mask(segmentation: object, height: int, width: int) -> RunLengths | str:
    """A segmentation as compressed run lengths, or why it cannot be used.

    Polygons [[x, y, ...], ...] of at least 3 points each, others are skipped; they may cover no pixel. Run
    lengths, compressed or not, of the image's size, which cover at least one pixel.

    Source: pycocotools mask; detectron2 data/datasets/coco.py skips polygons in the same way.
    """
    if not segmentation:
        return "no segmentation"
    if isinstance(segmentation, dict) and "counts" in segmentation:
        return _usable_run_lengths(segmentation, height, width)
    if not isinstance(segmentation, list):
        return "a segmentation that is neither polygons nor run lengths"
    reach = max(height, width)
    parts, defect = [], "no polygon"
    for part in segmentation:
        try:
            points = np.asarray(part, np.float64)
        except (TypeError, ValueError, OverflowError):
            points = np.array(np.nan)
        if points.ndim != 1:
            defect = "a segmentation that is neither polygons nor run lengths"
        elif len(points) < 6 or len(points) % 2:
            defect = "a polygon of fewer than 3 points"
        elif not np.isfinite(points).all():
            defect = "a polygon with a point that is not a number"
        elif points.min() < -reach or points.max() > 2 * reach:
            defect = "a polygon outside the image"
        else:
            parts.append(points)
    if not parts:
        return defect
    x, y = (np.concatenate([part[axis::2] for part in parts]) for axis in (0, 1))
    if x.max() <= 0 or y.max() <= 0 or x.min() >= width or y.min() >= height:
        return "a polygon outside the image"
    return run_lengths([part.tolist() for part in parts], height, width)


def run_lengths(polygons: list[list[float]], height: int, width: int) -> RunLengths:
    """Polygons [[x, y, ...], ...] of at least 3 points each -> compressed run lengths."""
    return dict(mask_api.merge(mask_api.frPyObjects(polygons, height, width)))


def _usable_run_lengths(shape: Mapping[str, Any], height: int, width: int) -> RunLengths | str:
    size, counts = shape.get("size"), shape["counts"]
    sides = [as_number(side) for side in size] if isinstance(size, list) else []
    if sides != [height, width]:
        return "run lengths of another size than the image"
    lengths = _lengths(counts) if isinstance(counts, str) else counts
    numbers = [as_number(length) for length in lengths] if isinstance(lengths, list) else [None]
    whole = [
        int(number) for number in numbers if number is not None and number >= 0 and number == int(number)
    ]
    if len(whole) != len(numbers) or sum(whole) != height * width:
        return "run lengths that do not fill the image"
    if not sum(whole[1::2]):
        return "a mask without a pixel"
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode()}
    return dict(mask_api.frPyObjects([{"size": [height, width], "counts": whole}], height, width)[0])


def _lengths(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed form, or None. Source: pycocotools maskApi.c rleFrString."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return None if shift else lengths


def decode_masks(masks: Sequence[RunLengths], height: int, width: int) -> np.ndarray:
    """n run lengths -> (n, H, W) uint8, 1 inside."""
    if not masks:
        return np.zeros((0, height, width), np.uint8)
    return np.ascontiguousarray(mask_api.decode(list(masks)).transpose(2, 0, 1))


def encode_masks(masks: np.ndarray) -> list[RunLengths]:
    """(n, H, W) of 0 and 1 -> n run lengths."""
    if not len(masks):
        return []
    return list(mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))))


def write(root: Path, split: str, annotations: Annotations, segmentations: Sequence[Sequence[Any]]) -> None:
    """Write `instances_<split>.json`; the caller writes the images to `root/<split>`.

    Args:
        root: the data set's folder.
        split: its name.
        annotations: images, boxes, labels and crowds.
        segmentations: for each image, one list of polygons or run lengths per object, in COCO's form.
    """
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, (image, shapes) in enumerate(zip(annotations.images, segmentations, strict=True), start=1):
        images.append(
            {"id": number, "file_name": image.path.name, "height": image.height, "width": image.width}
        )
        assert image.areas is not None
        for index, shape in enumerate(shapes):
            x0, y0, x1, y1 = (float(value) for value in image.boxes[index])
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": int(image.labels[index]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(image.areas[index]),
                    "iscrowd": int(image.ignored[index]),
                    "segmentation": shape,
                }
            )
    categories = [{"id": 1 + index, "name": name} for index, name in enumerate(annotations.classes)]
    write_json(
        root / "annotations" / f"instances_{split}.json",
        {"images": images, "annotations": objects, "categories": categories},
    )
