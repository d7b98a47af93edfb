"""Fifty steps by one, two and three processes: one loss curve, one encoder, one queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi.config import Training, parse_experiment, pretrain_run
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading
from mochi.pretraining.loop import TrainState, train
from mochi.pretraining.objectives import make_objective
from mochi.pretraining.optimizers import make_optimizer
from mochi.runtime.distributed import average_statistics, process_group, rank, world_size
from tests.tiny import changed

ROOT = Path(__file__).parents[1]
STEPS = 50
ROW = "moco-v2"


class Losses:
    """Observes a training: the loss of every step, over all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum = 0.0

    def check(self, state: TrainState, step: int, lr: float) -> None:  # noqa: ARG002
        self.losses.append(state.sums[0] - self._sum)
        self._sum = state.sums[0]

    def step_done(self, state: TrainState) -> None:
        pass

    def epoch_done(self, state: TrainState) -> None:  # noqa: ARG002
        self._sum = 0.0


def run(folder: Path) -> None:
    """What each process runs: the curve and the module's state, saved by the first one."""
    content = changed("methods", {ROW: {}})
    # Six groups and 48 images divide by one, two and three; 160 images are three steps an epoch.
    content["pretrain"] |= {"precision": "float32", "epochs": 17, "batch_size": 48, "bn_groups": 6}
    chosen = pretrain_run(parse_experiment(content, "tiny"), ROW, 0)
    assert isinstance(chosen.recipe, Training)
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    with process_group(cpu):
        objective = make_objective(chosen, open_dataset(folder / "data"))
        objective.module.to(memory_format=torch.channels_last)
        observer = Losses()
        loading = Loading(48, cpu, 0, rank(), world_size())
        optimizer = make_optimizer(objective.module, chosen.recipe)
        train(objective, chosen.recipe, optimizer, TrainState(), loading, observer)
        average_statistics(objective.module)
        if rank() == 0:
            (folder / f"losses{world_size()}.json").write_text(json.dumps(observer.losses[:STEPS]))
            state = {name: value.contiguous() for name, value in objective.module.state_dict().items()}
            save_file(state, folder / f"state{world_size()}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    prepare(parse_experiment(changed("methods", {ROW: {}}), "tiny").dataset, folder / "data", jobs=1)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / '.ci'}", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(Path(__file__)), str(folder)]
        subprocess.run(command, env=environment, check=True, timeout=600)
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_the_loss_curve_does_not_depend_on_the_processes(trained: Path, processes: int) -> None:
    one, several = (json.loads((trained / f"losses{number}.json").read_text()) for number in (1, processes))
    assert len(one) == STEPS
    assert several == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_nor_do_weights_statistics_and_queue(trained: Path, processes: int) -> None:
    one, several = (load_file(trained / f"state{number}.safetensors") for number in (1, processes))
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=1e-3, atol=1e-4, msg=name)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
