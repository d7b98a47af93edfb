"""Figures of a detector: ground truth next to detections, and precision against recall."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mochi.detection.annotations import AnnotationError
from mochi.detection.average_precision import Curve, Detections
from mochi.detection.batches import Images, read_rgb
from mochi.storage.atomic import replacing

_SHOWN_IMAGES = 4
_SHOWN_SCORE = 0.5
_RECALLS = np.linspace(0, 1, 101)


def write_curves(out: Path, curves: Sequence[Curve], classes: Sequence[str]) -> None:
    """precision_recall.csv (class, recall, precision at overlap .5) and precision_recall.png.

    Only for classes with objects.
    """
    shown = {name: _sampled(curve) for name, curve in zip(classes, curves, strict=True) if curve.positives}
    tables = [
        pd.DataFrame({"class": name, "recall": _RECALLS, "precision": precision})
        for name, precision in shown.items()
    ]
    head = pd.DataFrame(columns=["class", "recall", "precision"])
    with replacing(out / "precision_recall.csv") as temporary:
        (pd.concat(tables) if tables else head).to_csv(temporary, index=False, float_format="%.4f")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, precision in shown.items():
        axes.plot(_RECALLS, precision, label=name if len(shown) <= 20 else None, linewidth=1)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="overlap above .5")
    if shown:
        axes.plot(_RECALLS, np.mean(list(shown.values()), axis=0), color="black", label="mean")
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "nothing to find in the test images", ha="center")
    _save(figure, out / "precision_recall.png")


def _sampled(curve: Curve) -> NDArray[np.float64]:
    """Best precision at or beyond each recall, 0 if it is not reached."""
    best_after = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return np.append(best_after, 0.0)[np.searchsorted(curve.recall, _RECALLS)]


def draw_detections(path: Path, images: Images, detections: Detections) -> None:
    """Ground truth (left) and detections with a score of at least .5 (right) on the first test images."""
    annotations = images.annotations
    number = min(_SHOWN_IMAGES, len(annotations.images))
    figure = Figure(figsize=(6, 3 * number), layout="constrained")
    rows = figure.subplots(number, 2, squeeze=False)
    for index, (left, right) in enumerate(rows):
        image = annotations.images[index]
        pixels = read_rgb(image.path)
        if pixels.shape[:2] != (image.height, image.width):
            raise AnnotationError(f"{image.path}: its size changed since the annotations were read")
        for axes in (left, right):
            axes.imshow(pixels)
            axes.set_axis_off()
        for box, label, ignored in zip(image.boxes, image.labels, image.ignored, strict=True):
            _draw(left, box, annotations.classes[label - 1], "tab:gray" if ignored else "tab:green")
        shown = (detections.image == index) & (detections.scores >= _SHOWN_SCORE)
        for box, label, score in zip(
            detections.boxes[shown], detections.labels[shown], detections.scores[shown], strict=True
        ):
            _draw(right, box, f"{annotations.classes[label - 1]} {score:.2f}", "tab:red")
        left.set_title(f"{image.image_id}: truth (grey: ignored)", fontsize=8)
        right.set_title(f"detections, score at least {_SHOWN_SCORE:g}", fontsize=8)
    _save(figure, path)


def _draw(axes: Axes, box: NDArray[np.float32], text: str, color: str) -> None:
    x0, y0, x1, y1 = (float(value) for value in box)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.5))
    # Inside the box: above it, labels at the upper edge would cover the title.
    background = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
    axes.text(x0, y0, text, color="white", fontsize=6, verticalalignment="top", bbox=background)


def _save(figure: Figure, path: Path) -> None:
    # No time stamp, so that equal pictures are equal files.
    with replacing(path) as temporary, mpl.rc_context({"svg.hashsalt": "mochi"}):
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
