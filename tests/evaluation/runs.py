"""Helpers that evaluate the untrained row in a given folder and write images of noise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mochi.config import Experiment, probe_run
from mochi.evaluation import stage
from mochi.evaluation.features import Features
from mochi.provenance.wanted import Result, evaluated
from mochi.runtime.seeding import generator


def result_in(folder: Path, experiment: Experiment, task: str, encoder: Path, data: Path) -> Result:
    """The wanted result of this encoder and this prepared data set, in `folder`."""
    inputs = {"encoder": encoder, "data": data / "manifest.json"}
    return replace(evaluated(experiment, "random-init", 0, task), folder=folder, inputs=inputs)


def evaluate(experiment: Experiment, task: str, encoder: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Run the stage with results in `folder`; returns the content of metrics.json."""
    run = probe_run(experiment, "random-init", 0, task)
    stage.run(run, result_in(folder, experiment, task, encoder, data), folder / "work")
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def write_images(root: Path, counts: dict[str, int]) -> None:
    """Write the given number of noise images, 16 px, into each folder."""
    draw = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


def frozen_features(num_classes: int, **splits: tuple[Tensor, Tensor]) -> Any:
    """In place of `Frozen`: features and labels of each split, without an encoder."""
    return SimpleNamespace(
        run=SimpleNamespace(name="probe", method="random-init", seed=0),
        device=torch.device("cpu"),
        num_classes=num_classes,
        generator=generator,
        features=lambda split: Features(*(each.clone() for each in splits[split])),
        resume_point=SimpleNamespace(load=lambda: None, save_if_due=lambda *_: None),
    )


def clusters(num_classes: int, images_per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (M, 8) around one centre for each class, and labels, in random order."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_classes).repeat(images_per_class)
    labels = labels[torch.randperm(len(labels), generator=draws)]
    return centres[labels] + 0.7 * torch.randn(len(labels), 8, generator=draws), labels
