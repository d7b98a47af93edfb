"""Tiny annotated sets, a tiny detector, and the real sets where MOCHI_REAL_DATA names their folder."""

import dataclasses
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mochi import encoders
from mochi.config import DetectionModel, DetectionRun, DetectionSet, Encoder, Experiment, detection_run
from mochi.encoders.files import save_encoder
from mochi.provenance.wanted import Result, evaluated

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
    """A set over what `write_voc` wrote; changes by section."""
    return DetectionSet.model_validate(
        {
            "data": {
                "format": "voc", "path": str(root.parent), "train": [f"{root.name}/train"],
                "test": [f"{root.name}/test"], "classes": ["square", "bar"], "rule": "11-point",
                "broken_objects": "drop", "empty_images": "keep", **(data or {}),
            },
            "model": small_model(**(model or {})).model_dump(),
            "training": {
                "mode": "finetune", "seeds": [0], "lr": [0.02], "lr_batch_size": 2, "batch_size": 2,
                "micro_batch": 2, "iterations": 4, "warmup_iterations": 1, "schedule": "step",
                "lr_drops": [3], "momentum": 0.9, "weight_decay": 1e-4, "train_sizes": [32, 40],
                "test_size": 32, "max_size": 64, "flip": True, "precise_bn_batches": 1,
                "precision": "float32", **(training or {}),
            },
        }
    )  # fmt: skip


def detection(
    tiny: Experiment, chosen: DetectionSet, encoder_file: Path, folder: Path
) -> tuple[DetectionRun, Result]:
    """Arguments of the stage: a set of the tiny experiment, an encoder and a folder for results."""
    evaluation = tiny.evaluation.model_copy(update={"detection": {"few": chosen}})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    result = evaluated(experiment, "random-init", 0, "detection-few")
    inputs = {**result.inputs, "encoder": encoder_file}
    return detection_run(experiment, "random-init", 0, "few"), dataclasses.replace(
        result, folder=folder, inputs=inputs
    )


def voc_object(name: str = "square", box: tuple[object, ...] | None = (5, 6, 20, 22), **tags: int) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box or (), strict=False)
    bounds = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    extra = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags.items())
    return (
        f"<object><name>{name}</name>{extra}" + (f"<bndbox>{bounds}</bndbox>" if box else "") + "</object>"
    )


@pytest.fixture
def voc_image(tmp_path: Path) -> Callable[..., Path]:
    """Write one image of 48 x 40 with the objects given; returns the VOC folder."""
    root = tmp_path / "VOC"

    def write(*objects: str, name: str = "one", image_set: str = "train", size: str | None = None) -> Path:
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        stated = (
            "<size><width>48</width><height>40</height><depth>3</depth></size>" if size is None else size
        )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{stated}{''.join(objects)}</annotation>"
        )
        seed = int.from_bytes(name.encode()) % 1000
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        with (root / "ImageSets" / "Main" / f"{image_set}.txt").open("a") as listing:
            listing.write(f"{name}\n")
        return root

    return write


@pytest.fixture
def voc_set(voc_image: Callable[..., Path]) -> Path:
    """Six training and five test images with squares and bars; one of each without objects."""
    for index in range(6):
        objects = [voc_object("square", (3 + index, 4, 20 + index, 22)), voc_object("bar", (5, 25, 40, 36))]
        root = voc_image(*(objects if index else []), name=f"a{index}")
    for index in range(5):
        root = voc_image(
            *([voc_object("square", (8, 4 + index, 30, 25 + index))] if index else []),
            name=f"b{index}", image_set="test",
        )  # fmt: skip
    return root


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A random encoder of ENCODER's architecture."""
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoders.build(ENCODER, seed=5))
    return path


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpack one archive of real data, or skip."""

    def unpack(archive: str) -> Path:
        root = os.environ.get("MOCHI_REAL_DATA")
        if root is None or not (Path(root) / archive).exists():
            pytest.skip(f"real data {archive} not at hand: set MOCHI_REAL_DATA to the folder that holds it")
        folder = tmp_path_factory.mktemp("real")
        with tarfile.open(Path(root) / archive) as file:
            file.extractall(folder, filter="data")
        return folder

    return unpack
