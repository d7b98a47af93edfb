"""Helpers that evaluate the untrained row in a given folder and write images of noise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mochi.config import Experiment, probe_run
from mochi.evaluation import stage
from mochi.provenance.wanted import Result, evaluated


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
