"""A whole training step of each method of an experiment, and what it is made of."""

from collections.abc import Callable
from typing import Any

import torch

from mochi.benchmark.timing import Measurement, compare
from mochi.config import Contrastive, Experiment, Run, method_seeds, resolve
from mochi.data.format import StoredDataset
from mochi.pretraining.objectives import ContrastiveLearner
from mochi.runtime.precision import autocast


def run(
    experiment: Experiment, dataset: StoredDataset, *, rounds: int, device: torch.device
) -> list[Measurement]:
    """Steps of every contrastive method on the same batches, beside the encoders alone and the data alone.

    The baseline is the first contrastive method without mixing. `encoders alone` is its step without loss,
    queue and update of the momentum encoder: the ceiling.
    """
    runs = [
        resolve(experiment, method, method_seeds(experiment, method)[0]) for method in experiment.methods
    ]
    runs = [each for each in runs if isinstance(each.pretrain, Contrastive)]
    alternatives: dict[str, Callable[[], object]] = {}
    for each in runs:
        alternatives[each.method] = _step(each, dataset, device)
    base = baseline(runs)
    alternatives["encoders alone (ceiling)"] = _encoders(base, dataset, device)
    alternatives["data alone"] = _data(base, dataset, device)
    return compare(alternatives, baseline=base.method, rounds=rounds, device=device)


def baseline(runs: list[Run]) -> Run:
    """The first run without mixing."""
    plain = [run for run in runs if isinstance(run.pretrain, Contrastive) and run.pretrain.mixing is None]
    return plain[0] if plain else runs[0]


def _learner(run: Run, dataset: StoredDataset, device: torch.device) -> ContrastiveLearner:
    assert isinstance(run.pretrain, Contrastive)
    learner = ContrastiveLearner(run, run.pretrain, dataset.split("train"))
    learner.module.to(device).to(memory_format=torch.channels_last)
    learner.module.train()
    return learner


class _Endless:
    """Batches of epoch after epoch."""

    def __init__(self, learner: ContrastiveLearner, run: Run, device: torch.device) -> None:
        assert isinstance(run.pretrain, Contrastive)
        self._learner = learner
        self._loading: dict[str, Any] = {
            "batch_size": run.pretrain.batch_size, "seed": run.seed, "device": device
        }  # fmt: skip
        self._epoch = 0
        self._batches = learner.batches(0, 0, **self._loading)

    def next(self) -> Any:
        """The next batch."""
        batch = next(self._batches, None)
        if batch is None:
            self._epoch += 1
            self._batches = self._learner.batches(self._epoch, 0, **self._loading)
            batch = next(self._batches)
        return batch


def _step(run: Run, dataset: StoredDataset, device: torch.device) -> Callable[[], object]:
    recipe = run.pretrain
    assert isinstance(recipe, Contrastive)
    learner = _learner(run, dataset, device)
    batches = _Endless(learner, run, device)
    parameters = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, foreach=True)
    last_epoch, steps = recipe.epochs - 1, iter(range(1 << 30))

    def work() -> None:
        with autocast(device, recipe.precision):
            loss, _ = learner.loss(batches.next(), last_epoch, next(steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        learner.after_update(last_of_epoch=False)

    return work


def _encoders(run: Run, dataset: StoredDataset, device: torch.device) -> Callable[[], object]:
    recipe = run.pretrain
    assert isinstance(recipe, Contrastive)
    learner = _learner(run, dataset, device)
    batch = _Endless(learner, run, device).next()
    moco = learner.module

    def work() -> None:
        with autocast(device, recipe.precision):
            query = moco.get_submodule("query_encoder")(batch.query)
            with torch.no_grad():
                moco.get_submodule("momentum_encoder")(batch.key)
        query.float().sum().backward()

    return work


def _data(run: Run, dataset: StoredDataset, device: torch.device) -> Callable[[], object]:
    return _Endless(_learner(run, dataset, device), run, device).next
