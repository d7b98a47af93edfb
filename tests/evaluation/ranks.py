"""What each of the two ranks of test_ranks.py runs: every task, one after another, in one process group."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from mochi.config import load_experiment, probe_run
from mochi.evaluation import features, stage
from mochi.provenance.wanted import Result, same_features
from mochi.runtime import distributed
from tests.evaluation.runs import result_in


def evaluate_all(config: Path, encoder: Path, data: Path, folder: Path) -> None:
    """Every evaluation of the experiment into `folder`/<task>."""
    torch.set_num_threads(1)
    experiment = load_experiment(config)

    def result(task: str) -> Result:
        return result_in(folder / task, experiment, task, encoder, data)

    for task in experiment.evaluation.tasks:
        others = [result(other.folder.name) for other in same_features(experiment, "random-init", 0, task)]
        run = probe_run(experiment, "random-init", 0, task)
        stage.run(run, result(task), folder / "work", workers=0, others=others)


if __name__ == "__main__":
    features._PRECISION = "float32"  # as in conftest.py, in every process
    with distributed.process_group(torch.device("cpu")):
        stage.distributed.process_group = lambda device: nullcontext()
        evaluate_all(*map(Path, sys.argv[1:]))
