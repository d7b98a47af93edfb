"""Read COCO's instances JSON with all its oddities, and write it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api

from mochi.detection.annotations import AnnotatedImage, AnnotationError, Annotations, RunLengths, clip
from mochi.storage.atomic import write_json


def read(root: Path, split: str, broken_objects: str, masks: bool) -> Annotations:
    """Read `root/annotations/instances_<split>.json`; images lie in `root/<split>`.

    Categories become labels 1 to K in the order of their ids, gaps closed. Crowds are kept for evaluation
    (ignored there) and never trained on. Image ids may be numbers or strings.

    Args:
        root: the data set's folder.
        split: for example "train2017".
        broken_objects: "drop" (counted) or "fail", for objects without a usable box, and, with `masks`,
            without a usable segmentation.
        masks: read segmentations (polygons, compressed and uncompressed run lengths).

    Raises:
        AnnotationError: the file is missing or not COCO's, an object names an unknown image or category,
            or an object is broken and `broken_objects` is "fail".
    """
    path = root / "annotations" / f"instances_{split}.json"
    data = _load(path)
    categories = sorted(data["categories"], key=lambda category: int(category["id"]))
    labels = {category["id"]: 1 + index for index, category in enumerate(categories)}
    found: Counter[str] = Counter()
    objects: dict[str | int, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for item in data["annotations"]:
        where = f"{path}: annotation {item.get('id')}"
        if item.get("image_id") not in objects:
            raise AnnotationError(f"{where}: image_id {item.get('image_id')!r} is not among the images")
        if item.get("category_id") not in labels:
            raise AnnotationError(
                f"{where}: category_id {item.get('category_id')!r} is not a category: {list(labels)}"
            )
        objects[item["image_id"]].append(item)
    images = []
    for image in data["images"]:
        kept = []
        for item in objects[image["id"]]:
            defect = _defect(item, image, masks)
            if defect and broken_objects == "fail":
                raise AnnotationError(
                    f"{path}: annotation {item.get('id')} of image {image['id']!r}: {defect}; "
                    "correct the file, or set broken_objects: drop"
                )
            if defect:
                found[f"objects dropped: {defect}"] += 1
            else:
                kept.append(item)
        images.append(_image(root / split, image, kept, labels, masks, found))
    return Annotations(tuple(str(category["name"]) for category in categories), tuple(images), found)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file; COCO keeps a split's objects there") from None
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: is not valid JSON: {error}") from None
    missing = [key for key in ("images", "annotations", "categories") if key not in data]
    if missing:
        raise AnnotationError(f"{path}: found no {', '.join(missing)}; expected COCO's instances format")
    return dict(data)


def _defect(item: dict[str, Any], image: dict[str, Any], masks: bool) -> str:
    """What makes an object unusable, or nothing."""
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return "no bbox"
    if not np.isfinite(box).all() or box[2] <= 0 or box[3] <= 0:
        return "a box without area"
    corners = np.array([[box[0], box[1], box[0] + box[2], box[1] + box[3]]], np.float32)
    inside = clip(corners, image["height"], image["width"])[0]
    if (inside[2:] <= inside[:2]).any():
        return "a box outside the image"
    if masks and not item.get("segmentation"):
        return "no segmentation"
    return ""


def _image(
    folder: Path,
    image: dict[str, Any],
    objects: Sequence[dict[str, Any]],
    labels: dict[Any, int],
    masks: bool,
    found: Counter[str],
) -> AnnotatedImage:
    height, width = int(image["height"]), int(image["width"])
    boxes = np.array([item["bbox"] for item in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([bool(item.get("iscrowd", 0)) for item in objects], bool)
    found["crowds"] += int(crowd.sum())
    found["images without boxes"] += int(not objects)
    found["images with crowds alone"] += int(len(objects) > 0 and bool(crowd.all()))
    areas = [item.get("area", item["bbox"][2] * item["bbox"][3]) for item in objects]
    return AnnotatedImage(
        image["id"],
        folder / image["file_name"],
        height,
        width,
        clip(boxes.astype(np.float32), height, width),
        np.array([labels[item["category_id"]] for item in objects], np.int64),
        crowd,
        ~crowd,
        tuple(run_lengths(item["segmentation"], height, width) for item in objects) if masks else None,
        np.array(areas, np.float64),
    )


def run_lengths(segmentation: Any, height: int, width: int) -> RunLengths:
    """Polygons [[x, y, ...], ...], compressed or uncompressed run lengths -> compressed run lengths."""
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        counts = segmentation["counts"]
        return {
            "size": segmentation["size"],
            "counts": counts.encode() if isinstance(counts, str) else counts,
        }
    if isinstance(segmentation, list):
        parts = mask_api.frPyObjects(segmentation, height, width)
        return dict(mask_api.merge(parts))
    return dict(mask_api.frPyObjects([segmentation], height, width)[0])


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
    """Write `instances_<split>.json`; the images are the caller's, in `root/<split>`.

    Args:
        root: the data set's folder.
        split: its name.
        annotations: images, boxes, labels and crowds.
        segmentations: for each image one polygon list or run lengths an object, as COCO writes them.
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
