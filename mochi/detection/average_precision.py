"""Average precision, as PASCAL VOC and as COCO define it.

Shapes: M detections and G objects of all images; T = 10 overlap thresholds .5, .55, ... .95.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from mochi.detection.annotations import Annotations, RunLengths

logger = logging.getLogger(__name__)

THRESHOLDS = np.arange(50, 100, 5) / 100

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Detections:
    """Detections in a split, in the coordinates of the original images."""

    image: Integers  # (M,) index of the image in the split
    boxes: NDArray[np.float32]  # (M, 4)
    scores: NDArray[np.float32]  # (M,)
    labels: Integers  # (M,) from 1
    masks: list[RunLengths] | None = None  # M of them


@dataclass(frozen=True)
class Curve:
    """Precision against recall of one class at one threshold, detections by decreasing score."""

    recall: Floats
    precision: Floats
    positives: int
    """Objects to find, difficult ones not counted."""

    def average_precision(self, interpolation: str) -> float:
        """In [0, 1], or NaN if there are no objects.

        `11-point`: mean over recall 0, .1, ... 1 of the best precision from there on (VOC2007).
        `all-point`: area under the curve made monotone (VOC2010 and later).

        Source: rbgirshick/py-faster-rcnn voc_eval.py, which detectron2 uses.
        """
        if self.positives == 0:
            return float("nan")
        best_after = np.maximum.accumulate(self.precision[::-1])[::-1]
        if interpolation == "11-point":
            # The fourth is 0.30000000000000004, as in the public evaluator: it decides ties at recall 0.3.
            indices = np.searchsorted(self.recall, np.arange(0.0, 1.1, 0.1), side="left")
            return float(np.append(best_after, 0.0)[indices].mean())
        steps = np.diff(self.recall, prepend=0.0)
        return float((steps * best_after).sum())


def voc_curves(annotations: Annotations, detections: Detections, thresholds: Floats = THRESHOLDS) -> Any:
    """Curves [threshold][class].

    A detection belongs to the object of its class that it overlaps most. It is a true positive if that
    overlap is above the threshold and no detection with a higher score matched the object; it is ignored
    if the object is difficult; otherwise it is a false positive.

    Source: rbgirshick/py-faster-rcnn voc_eval.py, as in detectron2 evaluation/pascal_voc_evaluation.py.
    Deviation: scores and boxes are not rounded to 3 and 1 digits; equal scores keep the detector's order;
    a class without objects is left out of the mean, while the public code fails or
    gives NaN.
    """
    num_classes = len(annotations.classes)
    truth = _Truth.of(annotations)
    order = np.lexsort((-detections.scores, detections.labels))  # class by class, best first; stable
    labels = detections.labels[order]
    best, overlap = truth.best_match(
        detections.image[order], labels, detections.boxes[order].astype(np.float64)
    )
    starts = np.searchsorted(labels, np.arange(1, num_classes + 2))
    curves = []
    for threshold in thresholds:
        hit = overlap > threshold
        ignored = hit & truth.ignored[best] if len(truth.ignored) else hit
        candidate = np.flatnonzero(hit & ~ignored)
        right = np.zeros(len(order), bool)
        # The first detection of each object, best score first.
        right[candidate[np.unique(best[candidate], return_index=True)[1]]] = True
        wrong = ~right & ~ignored
        row = []
        for label in range(1, num_classes + 1):
            part = slice(starts[label - 1], starts[label])
            rights, wrongs = np.cumsum(right[part]), np.cumsum(wrong[part])
            positives = int(truth.positives[label])
            precision = rights / np.maximum(rights + wrongs, np.finfo(np.float64).eps)
            row.append(Curve(rights / max(positives, 1), precision, positives))
        curves.append(row)
    return curves


@dataclass(frozen=True)
class _Truth:
    """The objects of a split, sorted by (image, label): the candidates of a detection are one slice."""

    keys: Integers  # (G,)
    boxes: Floats  # (G, 4)
    ignored: NDArray[np.bool_]  # (G,)
    positives: Integers  # (K + 1,)

    @staticmethod
    def of(annotations: Annotations) -> "_Truth":
        width = len(annotations.classes) + 1
        keys = [number * width + image.labels for number, image in enumerate(annotations.images)]
        key = np.concatenate(keys) if keys else np.zeros(0, np.int64)
        order = np.argsort(key, kind="stable")
        boxes = np.concatenate([np.zeros((0, 4)), *(image.boxes for image in annotations.images)])
        ignored = np.concatenate([np.zeros(0, bool), *(image.ignored for image in annotations.images)])
        positives = np.bincount((key % width)[~ignored], minlength=width)
        return _Truth(key[order], boxes[order], ignored[order], positives)

    def best_match(self, image: Integers, labels: Integers, boxes: Floats) -> tuple[Integers, Floats]:
        """(M,) object that each detection overlaps most (ties: the first), and the overlap; -1 if none."""
        key = image * len(self.positives) + labels
        first = np.searchsorted(self.keys, key, side="left")
        counts = np.searchsorted(self.keys, key, side="right") - first
        best, overlap = np.zeros(len(key), np.int64), np.full(len(key), -1.0)
        rivals = np.flatnonzero(counts)
        if not len(rivals):
            return best, overlap
        counts = counts[rivals]
        offsets = np.cumsum(counts) - counts
        pair_detection = np.repeat(rivals, counts)
        pair_object = np.arange(counts.sum()) - np.repeat(offsets - first[rivals], counts)
        pair_overlap = _overlap(boxes[pair_detection], self.boxes[pair_object])
        overlap[rivals] = np.maximum.reduceat(pair_overlap, offsets)
        chosen = np.where(pair_overlap == overlap[pair_detection], pair_object, len(self.keys))
        best[rivals] = np.minimum.reduceat(chosen, offsets)
        return best, overlap


def _overlap(a: Floats, b: Floats) -> Floats:
    """Intersection over union of (n, 4) and (n, 4), pair by pair.

    VOC's inclusive pixels give the same number: xmax - xmin + 1 there is x1 - x0 here.
    """
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    common = sides.prod(axis=1)
    areas = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1)
    result: Floats = common / (areas - common)
    return result


def voc_metrics(curves: Any, classes: tuple[str, ...], interpolation: str) -> dict[str, Any]:
    """AP (mean over thresholds .5 to .95), AP50, AP75 by `interpolation`, percent; the other one too.

    None where there is nothing to find.
    """
    metrics: dict[str, Any] = {}
    for each in (interpolation, "all-point" if interpolation == "11-point" else "11-point"):
        table = 100 * np.array(
            [[curve.average_precision(each) for curve in row] for row in curves]
        )  # (T, K)
        present = table[:, ~np.isnan(table[0])]
        means = present.mean(axis=1) if present.size else None
        prefix = "" if each == interpolation else f"{each.replace('-', '_')}_"
        metrics |= {
            f"{prefix}AP": None if means is None else float(means.mean()),
            f"{prefix}AP50": None if means is None else float(means[0]),
            f"{prefix}AP75": None if means is None else float(means[5]),
        }
        if each == interpolation:
            metrics["AP50_by_class"] = {
                name: None if np.isnan(value) else float(value)
                for name, value in zip(classes, table[0], strict=True)
            }
    return metrics


def coco_metrics(annotations: Annotations, detections: Detections) -> dict[str, float | None]:
    """AP, AP50, AP75 of boxes and, where there are masks, mask_AP, mask_AP50, mask_AP75, percent.

    None if there are no objects. Crowds (and VOC's difficult objects) are ignored as COCO ignores crowds.
    Computed by faster-coco-eval; ids of images may be strings.
    """
    truth = _coco_truth(annotations)
    metrics: dict[str, float | None] = {}
    for prefix, kind in (("", "bbox"), ("mask_", "segm")):
        if kind == "segm" and detections.masks is None:
            continue
        results = truth.loadRes(_coco_results(detections, kind))
        evaluator = COCOeval_faster(truth, results, iouType=kind, print_function=logger.debug)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        for position, name in enumerate(("AP", "AP50", "AP75")):
            value = float(evaluator.stats[position])  # -1 if there are no objects
            metrics[f"{prefix}{name}"] = None if value < 0 else 100 * value
    return metrics


def _coco_truth(annotations: Annotations) -> Any:
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, image in enumerate(annotations.images, start=1):
        images.append({"id": number, "height": image.height, "width": image.width})
        for index, (x0, y0, x1, y1) in enumerate(image.boxes.astype(np.float64).tolist()):
            box = [x0, y0, x1 - x0, y1 - y0]
            item = {
                "id": len(objects) + 1,
                "image_id": number,
                "category_id": int(image.labels[index]),
                "bbox": box,
                "area": box[2] * box[3] if image.areas is None else float(image.areas[index]),
                "iscrowd": int(image.ignored[index]),
            }
            if image.masks is not None:
                item["segmentation"] = image.masks[index]
            objects.append(item)
    categories = [{"id": 1 + index, "name": name} for index, name in enumerate(annotations.classes)]
    return COCO({"images": images, "annotations": objects, "categories": categories})


def _coco_results(detections: Detections, kind: str) -> list[dict[str, Any]]:
    corners = detections.boxes.astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    rows = zip(
        (detections.image + 1).tolist(),
        detections.labels.tolist(),
        detections.scores.tolist(),
        corners.tolist(),
        strict=True,
    )
    results = [
        {"image_id": image, "category_id": label, "score": score, "bbox": box}
        for image, label, score, box in rows
    ]
    if kind == "segm":
        assert detections.masks is not None
        for result, mask in zip(results, detections.masks, strict=True):
            del result["bbox"]
            result["segmentation"] = mask
    return results
