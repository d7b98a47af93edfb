"""A step of the tiny experiment: its alternatives, with plain MoCo first if there is such a row."""

from pathlib import Path

import torch

from benchmarks import step
from mochi.config import Experiment
from mochi.data.format import open_dataset

MOCHI = "mochi-16-24-8"


def test_a_plain_method_is_the_baseline(tiny: Experiment, tiny_data: Path) -> None:
    methods = {**tiny.methods, "moco-v2": {"negatives": {"rule": "moco"}}}
    experiment = tiny.model_copy(update={"methods": methods})
    rows = step.run(experiment, open_dataset(tiny_data), rounds=1, device=torch.device("cpu"))
    assert [row.name for row in rows] == [
        "moco-v2",
        MOCHI,
        "encoders alone",
        "encoders alone, plain batch norm (lower bound)",
        "data alone",
    ]
    assert rows[0].ratios == [1]
    assert all(row.seconds[0] > 0 for row in rows)


def test_without_a_plain_method_the_first_is_the_baseline(tiny: Experiment, tiny_data: Path) -> None:
    rows = step.run(tiny, open_dataset(tiny_data), rounds=1, device=torch.device("cpu"))
    assert rows[0].name == MOCHI
