"""Helpers that train the tiny experiment with one row, for tests on simulated and real GPUs."""

import copy
from pathlib import Path
from typing import Any

from mochi.config import Experiment, parse_experiment, pretrain_run
from mochi.pretraining import stage
from tests.pretraining.runs import encoder_bytes, result_in
from tests.tiny import TINY

METHOD = "row"

MOCHI = {"rule": "mochi", "num_hardest": 16, "num_pair_synthetics": 8, "num_query_synthetics": 8,
         "warmup_epochs": 1}  # fmt: skip
CONTRASTIVE: dict[str, Any] = {"negatives": MOCHI}
ROWS: dict[str, dict[str, Any]] = {
    "contrastive": CONTRASTIVE,
    "through the query": {"negatives": {**MOCHI, "through_query": True}},
    "masks": {**CONTRASTIVE, "masks": ["class_oracle", "same_image"]},
    "supervised": {"objective": "supervised"},
}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "v1": {"version": "v1", "image_size": 16, "min_scale": 0.2},
    "v2": {"version": "v2", "image_size": 16, "min_scale": 0.2, "blur": True},
}


def experiment(
    storage: str, row: str = "contrastive", augmentation: str = "v2", photos: Path = Path(), **recipe: Any
) -> Experiment:
    """The tiny experiment with one row."""
    content = copy.deepcopy(TINY)
    if storage == "jpegs":
        content["dataset"] = {"source": "folder", "name": "jpegs", "path": str(photos)}
    content["methods"] = {METHOD: ROWS[row]}
    content["augmentation"] = AUGMENTATIONS[augmentation]
    content["pretrain"] |= recipe
    return parse_experiment(content, "tiny")


def pretrain(chosen: Experiment, data: Path, folder: Path, workers: int = 0) -> bytes:
    """Train; returns the bytes of the encoder file."""
    run, result = pretrain_run(chosen, METHOD, 0), result_in(folder, chosen, data, METHOD)
    stage.run(run, result, folder / "work", workers=workers)
    return encoder_bytes(folder)
