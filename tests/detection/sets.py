"""Tiny detection sets, the sections of an experiment that describe them, and a tiny detector."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from mochi.config import DetectionModel, DetectionRun, DetectionSet, Encoder, Experiment
from mochi.provenance.wanted import Result, evaluated, fine_tuning_run
from tests.tiny import TINY

ENCODER = Encoder(architecture="resnet10", stem="half", width=4)


def small_model(**changes: object) -> DetectionModel:
    values = {
        "masks": False, "anchor_sizes": [12.0, 24.0], "anchor_ratios": [0.5, 1.0, 2.0], "rpn_batch": 16,
        "proposals_train": [60, 20], "proposals_test": [60, 10], "roi_size": 4, "roi_batch": 8,
        "roi_positive": 0.25, "score_threshold": 0.0, "max_detections": 5,
    }  # fmt: skip
    return DetectionModel.model_validate({**values, **changes})


def small_set(root: Path, *, data: dict[str, object] | None = None, model: dict[str, object] | None = None,
              training: dict[str, object] | None = None) -> DetectionSet:  # fmt: skip
    """A detection set in a folder that `write_voc` wrote; changes by section."""
    return DetectionSet.model_validate(
        {
            "data": {
                "format": "voc", "path": str(root.parent), "train": [f"{root.name}/train"],
                "test": [f"{root.name}/test"], "classes": ["square", "bar"], "interpolation": "11-point",
                "broken_objects": "drop", "empty_images": "keep", **(data or {}),
            },
            "model": small_model(**(model or {})).model_dump(),
            "training": {
                "mode": "finetune", "seeds": [0], "together": True, "lr": [0.02], "lr_batch_size": 2,
                "batch_size": 2, "micro_batch": 2, "iterations": 4, "warmup_iterations": 1,
                "schedule": "step",
                "lr_drops": [3], "momentum": 0.9, "weight_decay": 1e-4, "train_sizes": [32, 40],
                "test_size": 32, "max_size": 64, "flip": True, "precise_bn_batches": 1,
                "precision": "float32", **(training or {}),
            },
        }
    )  # fmt: skip


def detection(
    tiny: Experiment, chosen: DetectionSet, encoder_file: Path, folder: Path, job: str = "few"
) -> tuple[DetectionRun, Result]:
    """Arguments of the stage: a set of the tiny experiment, an encoder and a folder for results.

    A learning rate search, whose result a fine-tuning needs, is in a folder next to it.
    """
    evaluation = tiny.evaluation.model_copy(update={"detection": {"few": chosen}})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    result = evaluated(experiment, "random-init", 0, f"detection-{job}")
    inputs = {**result.inputs, "encoder": encoder_file}
    if "lr" in inputs:
        inputs["lr"] = folder.parent / "lr-search" / "metrics.json"
    return fine_tuning_run(experiment, "random-init", 0, job), dataclasses.replace(
        result, folder=folder, inputs=inputs
    )


def voc_object(name: str = "square", box: tuple[object, ...] | None = (5, 6, 20, 22), **tags: int) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box or (), strict=False)
    bounds = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    extra = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags.items())
    return (
        f"<object><name>{name}</name>{extra}" + (f"<bndbox>{bounds}</bndbox>" if box else "") + "</object>"
    )


def tiny_with_detection(**changes: Any) -> dict[str, Any]:
    """The tiny experiment with two sets on the same scenes; changes are applied to the first."""
    data = copy.deepcopy(TINY)
    scenes: dict[str, object] = {
        "format": "voc", "path": "data/few-scenes", "train": ["VOC/train"], "test": ["VOC/test"],
        "classes": ["brick", "coffee"], "interpolation": "11-point", "broken_objects": "fail",
        "empty_images": "keep",
        "scenes": {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 0},
    }  # fmt: skip
    base = small_set(Path("VOC"), data=scenes).model_dump(mode="json", exclude_none=True)
    frozen = copy.deepcopy(base)
    frozen["training"] |= {"mode": "frozen", "seeds": [0, 1]}
    data["evaluation"]["detection"] = {"few": {**base, **changes}, "few-frozen": frozen}
    return data
