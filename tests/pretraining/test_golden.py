"""The losses of fifty steps compared with recorded ones, so that no number changes unnoticed.

If a change is intended, write the file again and give the reason in the commit message:

    python -m tests.pretraining.test_golden

The steps are the first five of ten trainings, each of which starts in another epoch of the recipe. In a
longer training, rounding differences between CPUs grow larger than the changes to be detected.
"""

import hashlib
import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mochi.config import Training, parse_experiment, pretrain_run
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading
from mochi.pretraining.loop import TrainState, train
from mochi.pretraining.objectives import make_objective
from mochi.pretraining.optimizers import make_optimizer
from tests.tiny import MOCHI, changed

GOLDEN = Path(__file__).with_name("golden.json")
METHODS = ["moco-v2", MOCHI]
CPU = torch.device("cpu")


def write_images(root: Path) -> None:
    """320 images of 24 px, each nine squares of colour from a hash: the same with every numpy version."""
    (root / "train").mkdir(parents=True)
    for index in range(320):
        colours = np.frombuffer(hashlib.sha256(str(index).encode()).digest(), np.uint8)[:27]
        pixels = colours.reshape(3, 3, 3).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(root / "train" / f"{index:03}.png")


class OneEpoch:
    """Observer of a training: collects the loss of every step and stops at the end of an epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum = 0.0

    def check(self, state: TrainState, step: int, lr: float) -> None:
        self.losses.append(round(state.sums[0] - self._sum, 6))
        self._sum = state.sums[0]

    def step_done(self, state: TrainState) -> None:
        pass

    def epoch_done(self, state: TrainState) -> None:
        raise StopIteration


def losses(method: str, folder: Path) -> list[float]:
    """The losses in float32 on one thread, with the real objective, loop and loaders."""
    write_images(folder / "images")
    source = Folder(source="folder", name="waves", path=str(folder / "images"))
    prepare(source, folder / "data", jobs=1)
    content = changed("methods/moco-v2", {})
    content["pretrain"] |= {"epochs": 10, "batch_size": 64, "precision": "float32"}
    # All are larger than in tiny.yaml: then a single unit, and its rounding, matters little.
    content["encoder"]["width"], content["augmentation"]["image_size"] = 24, 32
    run = pretrain_run(parse_experiment(content, "golden"), method, 0)
    recipe = run.recipe
    assert isinstance(recipe, Training)
    torch.set_num_threads(1)
    trace = []
    for epoch in range(recipe.epochs):
        objective = make_objective(run, open_dataset(folder / "data"))
        objective.module.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(objective.module, recipe)
        observer, loading = OneEpoch(), Loading(recipe.batch_size, CPU)
        with suppress(StopIteration):
            train(objective, recipe, optimizer, TrainState(epoch=epoch), loading, observer)
        trace += observer.losses
    return trace


@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_the_recorded_ones(method: str, tmp_path: Path) -> None:
    found, expected = losses(method, tmp_path), json.loads(GOLDEN.read_text())[method]
    assert len(found) == len(expected) == 50
    moved = [
        f"step {step}: {now}, was {before}"
        for step, (now, before) in enumerate(zip(found, expected, strict=True))
        if not math.isclose(now, before, rel_tol=1e-3)
    ]
    assert not moved, (
        f"{method}: {len(moved)} of 50 losses moved, {moved[0]}. The views, the encoder, the loss, the "
        "optimizer or the random numbers compute something else than before, and so will every experiment. "
        "If that is intended, run `python -m tests.pretraining.test_golden` and say why in the commit"
    )


if __name__ == "__main__":
    traces = {}
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            traces[name] = losses(name, Path(folder))
    GOLDEN.write_text(json.dumps(traces, indent=1) + "\n")
