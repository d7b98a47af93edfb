"""Two processes compared with one: they split the images and give the same metrics."""

import json
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import pytest
import torch
import yaml

from mochi.config import load_experiment, probe_run
from mochi.evaluation import features, stage
from mochi.provenance.wanted import RECORD, Result, same_features
from mochi.runtime import distributed
from tests.evaluation.runs import result_in
from tests.processes import run_ranks
from tests.tiny import TINY

LINEAR = TINY["evaluation"]["linear"]
# Batches that cannot be halved, and a last one with a single image, so that one rank has none.
EVALUATION = {
    "image_size": 16,
    "resize": 16,
    "batch_size": 33,
    "linear": LINEAR,
    "crops": LINEAR | {"task": "linear", "min_scale": 0.2, "batch_size": 53, "epochs": 2, "lr_drops": []},
    "knn": {"k": [5, 20], "temperature": 0.07},
    "few": {"task": "few_label", "images_per_class": 2, "samples": 2},
}


def evaluate_all(config: Path, encoder: Path, data: Path, folder: Path) -> None:
    """Every evaluation of the experiment into `folder`/<task>, one after another."""
    torch.set_num_threads(1)
    experiment = load_experiment(config)

    def result(task: str) -> Result:
        return result_in(folder / task, experiment, task, encoder, data)

    for task in experiment.evaluation.tasks:
        others = [result(other.folder.name) for other in same_features(experiment, "random-init", 0, task)]
        run = probe_run(experiment, "random-init", 0, task)
        stage.run(run, result(task), folder / "work", workers=0, others=others)


def evaluate_as_rank(config: Path, encoder: Path, data: Path, folder: Path) -> None:
    """The same in a process of one group, which serves all tasks."""
    features._PRECISION = "float32"  # as in conftest.py, in every process
    stage.distributed.process_group = lambda device: nullcontext()
    with output(folder, distributed.rank()).open("w") as file, redirect_stderr(file):
        evaluate_all(config, encoder, data, folder)


def output(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"


def test_two_processes_give_the_metrics_of_one(
    encoder_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"evaluation": EVALUATION}))
    arguments = [Path("tiny.yaml").resolve(), encoder_file, tiny_data]
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    run_ranks(evaluate_as_rank, 2, *arguments, two)
    evaluate_all(*arguments, one)
    for task in EVALUATION.keys() - {"image_size", "resize", "batch_size"}:
        for name in ("metrics.json", "confusion.csv"):
            assert (two / task / name).read_text() == (one / task / name).read_text(), task
        assert json.loads((two / task / RECORD).read_text())["world_size"] == 2
    # `crops` encodes its held-out images; the other evaluations share features.
    text = output(two, 0).read_text()
    assert (text.count("features of train:"), text.count("features of val:")) == (2, 1)
    assert output(two, 1).read_text() == ""
    assert not list(Path("work").rglob("*.npy"))
