"""A complete training step of each method of an experiment, and its parts."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import (
    Measurement,
    Rounds,
    Threads,
    compare,
    compare_in_turn,
    conditions,
    table,
)
from mochi.config import Contrastive, Experiment, PretrainRun, first_runs, load_experiment
from mochi.contrast.moco import MoCo
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.views.loading import Loading
from mochi.encoders.batch_norm import GroupedBatchNorm2d
from mochi.pretraining.objectives import ContrastiveObjective
from mochi.runtime.cpu_memory import keep_freed_memory
from mochi.runtime.cuda_graphs import use_cuda_graph
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import autocast


def main(
    config: Annotated[Path, typer.Option(help="Experiment file.")] = Path("config/config.yaml"),
    data_root: Annotated[Path, typer.Option(help="Folder of the prepared data sets.")] = Path("data"),
    rounds: Rounds = 30,
    threads: Threads = 1,
) -> None:
    """Compare a training step of each contrastive method, the encoders alone and the data alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = pick_device()
    experiment = load_experiment(config)
    dataset = open_dataset(data_root / experiment.dataset.name)
    print(conditions(device))
    print("\n".join(table(run(experiment, dataset, rounds=rounds, device=device))))


def run(
    experiment: Experiment,
    dataset: StoredDataset,
    *,
    rounds: int,
    device: torch.device,
    same_batch: bool = False,
    more: Mapping[str, Callable[[], Callable[[], object]]] | None = None,
) -> list[Measurement]:
    """Steps of every contrastive method on the same batches, the encoders alone and the data alone.

    The baseline is the first contrastive method without synthetic negatives. `encoders alone` is its
    forward and backward passes, without loss, queue, optimizer and update of the momentum encoder. With
    plain batch normalisation, without groups, it is the lower bound. On a GPU the alternatives are measured
    one after another, because its memory may not hold all of them.

    Args:
        experiment: its contrastive rows are compared.
        dataset: its images.
        rounds: number of rounds, see `harness.compare`.
        device: where to compute.
        same_batch: train on the same batch in every step, so that loading takes no time.
        more: further alternatives: name -> a function that makes the call.
    """
    runs = [each for each in first_runs(experiment) if isinstance(each.recipe, Contrastive)]
    if not runs:
        raise typer.BadParameter(f"{experiment.name}: found no contrastive method; expected at least one")
    base = next((each for each in runs if _is_plain(each)), runs[0])
    alternatives: dict[str, Callable[[], Callable[[], object]]] = {
        each.method: partial(_step, each, dataset, device, same_batch=same_batch)
        for each in sorted(runs, key=lambda each: each is not base)
    }
    encoders = partial(_encoders, base, dataset, device)
    alternatives["encoders alone"] = encoders
    alternatives["encoders alone, plain batch norm (lower bound)"] = partial(encoders, plain=True)
    if not same_batch:
        alternatives["data alone"] = partial(_data, base, dataset, device)
    alternatives |= more or {}
    if device.type == "cuda":
        return compare_in_turn(alternatives, rounds=rounds, device=device)
    made = {name: make() for name, make in alternatives.items()}
    return compare(made, rounds=rounds, device=device, memory=True)


def _is_plain(run: PretrainRun) -> bool:
    return isinstance(run.recipe, Contrastive) and not run.recipe.negatives.make().num_synthetics


def _objective(run: PretrainRun, dataset: StoredDataset, device: torch.device) -> ContrastiveObjective:
    assert isinstance(run.recipe, Contrastive)
    objective = ContrastiveObjective(run, run.recipe, dataset.split("train"))
    objective.module.to(device).to(memory_format=torch.channels_last)
    objective.module.train()
    return objective


class _Endless:
    """Repeats the batches of an epoch for ever; with `same_batch`, only the first."""

    def __init__(
        self,
        objective: ContrastiveObjective,
        run: PretrainRun,
        device: torch.device,
        *,
        same_batch: bool = False,
    ) -> None:
        assert isinstance(run.recipe, Contrastive)
        self._objective = objective
        self._loading = Loading(run.recipe.batch_size, device)
        self._batches: Iterator[Any] = objective.batches(self._loading, 0, 0)
        if same_batch:
            self._batches = repeat(next(self._batches))

    def next(self) -> Any:
        """The next batch."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._objective.batches(self._loading, 0, 0)
            batch = next(self._batches)
        return batch


def _step(
    run: PretrainRun, dataset: StoredDataset, device: torch.device, *, same_batch: bool
) -> Callable[[], object]:
    recipe = run.recipe
    assert isinstance(recipe, Contrastive)
    objective = _objective(run, dataset, device)
    batches = _Endless(objective, run, device, same_batch=same_batch)
    parameters = [parameter for parameter in objective.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, foreach=True)
    last_epoch, steps = recipe.epochs - 1, iter(range(1 << 30))

    def work() -> None:
        with autocast(device, recipe.precision):
            loss, _ = objective.loss(batches.next(), last_epoch, next(steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        objective.after_update(last_of_epoch=False)

    return work


def _encoders(
    run: PretrainRun, dataset: StoredDataset, device: torch.device, *, plain: bool = False
) -> Callable[[], object]:
    recipe = run.recipe
    assert isinstance(recipe, Contrastive)
    objective = _objective(run, dataset, device)
    batch = _Endless(objective, run, device).next()
    moco = objective.module
    assert isinstance(moco, MoCo)
    if plain:
        for module in moco.modules():
            if isinstance(module, GroupedBatchNorm2d):
                module.num_groups = 1
    with autocast(device, recipe.precision):
        use_cuda_graph(moco.query_encoder, batch.query)
        use_cuda_graph(moco.momentum_encoder, batch.key)

    def work() -> None:
        moco.zero_grad(set_to_none=True)
        with autocast(device, recipe.precision):
            query = moco.query_encoder(batch.query)
            with torch.no_grad():
                moco.momentum_encoder(batch.key)
        query.float().sum().backward()

    return work


def _data(run: PretrainRun, dataset: StoredDataset, device: torch.device) -> Callable[[], object]:
    return _Endless(_objective(run, dataset, device), run, device).next


if __name__ == "__main__":
    typer.run(main)
