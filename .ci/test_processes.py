"""Fifty steps by one, two and three processes: the same losses, weights, statistics and queue.

In float64 they are fifty steps in a row. In float32 they are the first five of each of ten epochs: the sum
over ranks is rounded differently, which moves an activation across zero sooner or later, and from there on
the results differ.
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
from torch import nn

from mochi.config import Training, parse_experiment, pretrain_run
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading
from mochi.encoders.resnet import ResNet
from mochi.pretraining.loop import TrainState, train
from mochi.pretraining.objectives import make_objective
from mochi.pretraining.optimizers import make_optimizer
from mochi.runtime.distributed import process_group, rank, world_size
from tests.tiny import changed

ROOT = Path(__file__).parents[1]
TRAININGS = {"float32": (10, 5), "float64": (1, 50)}
"""Precision -> number of trainings, steps of each."""
ROW = "moco-v2"


class Losses:
    """Observer of a training: the losses of its first steps over all ranks; stops after them."""

    def __init__(self, steps: int) -> None:
        self.losses: list[float] = []
        self._steps = steps
        self._sum = 0.0

    def check(self, state: TrainState, step: int, lr: float) -> None:  # noqa: ARG002
        self.losses.append(state.sums[0] - self._sum)
        self._sum = state.sums[0]
        if len(self.losses) == self._steps:
            raise StopIteration

    def step_done(self, state: TrainState) -> None:
        pass

    def epoch_done(self, state: TrainState) -> None:  # noqa: ARG002
        self._sum = 0.0


def run(folder: Path, precision: str) -> None:
    """What each process runs: the losses and module states, saved by the first process."""
    starts, steps = TRAININGS[precision]
    content = changed("methods", {ROW: {}})
    # Six groups and 48 images divide by one, two and three.
    content["pretrain"] |= {"precision": "float32", "epochs": 20, "batch_size": 48, "bn_groups": 6}
    content["pretrain"]["matching_epochs"] = []
    chosen = pretrain_run(parse_experiment(content, "tiny"), ROW, 0)
    assert isinstance(chosen.recipe, Training)
    torch.set_num_threads(1)
    cpu, losses, states = torch.device("cpu"), [], {}
    with process_group(cpu):
        for start in range(starts):
            objective = make_objective(chosen, open_dataset(folder / "data"))
            objective.module.to(memory_format=torch.channels_last)
            if precision == "float64":
                use_float64(objective.module)
            observer, optimizer = Losses(steps), make_optimizer(objective.module, chosen.recipe)
            loading = Loading(48, cpu, 0, rank(), world_size())
            with suppress(StopIteration):
                train(objective, chosen.recipe, optimizer, TrainState(epoch=start), loading, observer)
            losses += observer.losses
            for name, value in objective.module.state_dict().items():
                states[f"{start}.{name}"] = value.contiguous()
        if rank() == 0:
            losses_of(folder, precision, world_size()).write_text(json.dumps(losses))
            save_file(states, states_of(folder, precision, world_size()))


def use_float64(module: nn.Module) -> None:
    """Convert parameters and buffers, the images at the input of each encoder, and what leaves autocast."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    module.double()
    for part in module.modules():
        if isinstance(part, ResNet):
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))


def losses_of(folder: Path, precision: str, processes: int) -> Path:
    return folder / f"losses-{precision}-{processes}.json"


def states_of(folder: Path, precision: str, processes: int) -> Path:
    return folder / f"states-{precision}-{processes}.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    prepare(parse_experiment(changed("methods", {ROW: {}}), "tiny").dataset, folder / "data", jobs=1)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / '.ci'}", "OMP_NUM_THREADS": "1"}
    for precision in TRAININGS:
        for processes in (1, 2, 3):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}", str(Path(__file__)), str(folder), precision]
            subprocess.run(command, env=environment, check=True, timeout=600)
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_fifty_float64_steps_in_a_row(trained: Path, processes: int) -> None:
    one, several = (json.loads(losses_of(trained, "float64", n).read_text()) for n in (1, processes))
    assert len(one) == 50
    assert several == pytest.approx(one, rel=1e-12)
    alone, together = (load_file(states_of(trained, "float64", n)) for n in (1, processes))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("processes", [2, 3])
def test_five_float32_steps_from_each_of_ten_epochs(trained: Path, processes: int) -> None:
    """At least seven of ten trainings must agree; in the others an activation may have crossed zero."""
    one, several = (json.loads(losses_of(trained, "float32", n).read_text()) for n in (1, processes))
    assert len(one) == len(several) == 50
    equal = [
        start
        for start in range(10)
        if several[start * 5 :][:5] == pytest.approx(one[start * 5 :][:5], rel=1e-5)
    ]
    assert len(equal) >= 7, [f"{abs(a - b) / a:.0e}" for a, b in zip(one, several, strict=True)]
    alone, together = (load_file(states_of(trained, "float32", n)) for n in (1, processes))
    for name, value in alone.items():
        if int(name.split(".")[0]) in equal:
            torch.testing.assert_close(together[name], value, rtol=1e-2, atol=1e-3, msg=name)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
