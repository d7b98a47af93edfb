"""Helpers that train the tiny experiment in a given folder and read the results."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mochi.config import Experiment, pretrain_run
from mochi.pretraining import stage
from mochi.provenance.wanted import Result, pretrained
from tests.tiny import MOCHI

_TIMINGS = {"images_per_second", "data_wait"}


def result_in(
    folder: Path, experiment: Experiment, data: Path, method: str = MOCHI, seed: int = 0
) -> Result:
    """The wanted result in `folder/out`, from the prepared data in `data`."""
    result = pretrained(experiment, method, seed)
    inputs = {"data": data / "manifest.json"} if result.inputs else {}
    return replace(result, folder=folder / "out", inputs=inputs)


def train(experiment: Experiment, data: Path, folder: Path, method: str = MOCHI, seed: int = 0) -> bytes:
    """Train with checkpoints in `folder/work`; returns the bytes of the encoder file."""
    torch.set_num_threads(1)  # also in a separate process; bytes depend on the number of threads
    run = pretrain_run(experiment, method, seed)
    stage.run(run, result_in(folder, experiment, data, method, seed), folder / "work")
    return encoder_bytes(folder)


def encoder_bytes(folder: Path) -> bytes:
    return (folder / "out" / "encoder.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that depend on the speed of the machine."""
    with (folder / "out" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in _TIMINGS} for row in csv.DictReader(file)]


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "provenance.json").read_text())
    return content


def saved_in(folder: Path) -> Path:
    """The resume checkpoint."""
    return folder / "work" / "checkpoint.safetensors"


def steps_done(saved: Path) -> int:
    """Steps in a checkpoint, 5 in each epoch; -1 if there is none."""
    if not saved.exists():
        return -1
    # safe_open opens the path twice, and the file is replaced continually.
    with saved.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    state = json.loads(header["__metadata__"]["state"])
    return int(5 * state["epoch"] + state["step"])
