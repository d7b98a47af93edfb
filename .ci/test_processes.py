"""Fifty steps by one, two and three processes: the same losses, weights, statistics and queue.

They are the first five steps from each of ten epochs. In a longer training, a rounding difference in the
sum over ranks moves an activation across zero sooner or later, and results differ.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
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
from mochi.runtime.distributed import process_group, rank, world_size
from tests.tiny import changed

ROOT = Path(__file__).parents[1]
STARTS, STEPS = 10, 5
ROW = "moco-v2"


class Losses:
    """Observer of a training: the losses of its first steps over all ranks; stops after them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum = 0.0

    def check(self, state: TrainState, step: int, lr: float) -> None:  # noqa: ARG002
        self.losses.append(state.sums[0] - self._sum)
        self._sum = state.sums[0]
        if len(self.losses) == STEPS:
            raise StopIteration

    def step_done(self, state: TrainState) -> None:
        pass

    def epoch_done(self, state: TrainState) -> None:  # noqa: ARG002
        self._sum = 0.0


def run(folder: Path) -> None:
    """What each process runs: the losses and module states, saved by the first process."""
    content = changed("methods", {ROW: {}})
    # Six groups and 48 images divide by one, two and three.
    content["pretrain"] |= {"precision": "float32", "epochs": STARTS + 1, "batch_size": 48, "bn_groups": 6}
    chosen = pretrain_run(parse_experiment(content, "tiny"), ROW, 0)
    assert isinstance(chosen.recipe, Training)
    torch.set_num_threads(1)
    cpu, losses, states = torch.device("cpu"), [], {}
    with process_group(cpu):
        for start in range(STARTS):
            objective = make_objective(chosen, open_dataset(folder / "data"))
            objective.module.to(memory_format=torch.channels_last)
            observer, optimizer = Losses(), make_optimizer(objective.module, chosen.recipe)
            loading = Loading(48, cpu, 0, rank(), world_size())
            with suppress(StopIteration):
                train(objective, chosen.recipe, optimizer, TrainState(epoch=start), loading, observer)
            losses += observer.losses
            for name, value in objective.module.state_dict().items():
                states[f"{start}.{name}"] = value.contiguous()
        if rank() == 0:
            (folder / f"losses{world_size()}.json").write_text(json.dumps(losses))
            save_file(states, folder / f"state{world_size()}.safetensors")


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
def test_nothing_depends_on_the_number_of_processes(trained: Path, processes: int) -> None:
    """At least seven of ten trainings must agree; in the others an activation may have crossed zero."""
    one, several = (json.loads((trained / f"losses{number}.json").read_text()) for number in (1, processes))
    assert len(one) == len(several) == STARTS * STEPS
    equal = [
        start
        for start in range(STARTS)
        if several[start * STEPS :][:STEPS] == pytest.approx(one[start * STEPS :][:STEPS], rel=1e-5)
    ]
    assert len(equal) >= 7, [f"{abs(a - b) / a:.0e}" for a, b in zip(one, several, strict=True)]
    alone, together = (load_file(trained / f"state{number}.safetensors") for number in (1, processes))
    for name, value in alone.items():
        if int(name.split(".")[0]) in equal:
            torch.testing.assert_close(together[name], value, rtol=1e-2, atol=1e-3, msg=name)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
