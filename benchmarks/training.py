"""Epochs of MoCo-v2, from images to updated weights: this project, lightly, and the encoders alone.

All train the same encoder on the same images: batch 256, bfloat16 autocast, SGD. "Encoders alone" has
plain batch normalisation and one batch already in memory: no training can be faster.
"""

import copy
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.data.pictures import make_pictures, prepared
from benchmarks.harness import Measurement, Rounds, compare, conditions, table
from mochi import encoders
from mochi.config import Contrastive, Encoder, PretrainRun, load_experiment, pretrain_run
from mochi.data.format import StoredSplit
from mochi.data.views.loading import Loading
from mochi.encoders.heads import projection_head
from mochi.pretraining.objectives import ContrastiveObjective
from mochi.pretraining.optimizers import make_optimizer
from mochi.runtime.cpu_memory import keep_freed_memory
from mochi.runtime.precision import autocast

_BATCH, _QUEUE, _DIM, _SIZE = 256, 4096, 128, 32
_CPU = torch.device("cpu")


def main(
    rounds: Rounds = 5,
    num_images: Annotated[int, typer.Option(min=_BATCH, help="Images of 32 px in an epoch.")] = 2048,
    cores: Annotated[
        int, typer.Option(min=1, help="CPU threads, and worker processes of lightly's loader.")
    ] = 2,
) -> None:
    """Compare an epoch of MoCo-v2 with lightly's and with the encoders alone."""
    torch.set_num_threads(cores)
    keep_freed_memory()
    print(conditions())
    if importlib.util.find_spec("lightly") is None:
        print("lightly is not installed and is left out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, max(num_images // 2, _BATCH))
        found = run(folder, rounds=rounds, cores=cores)
        num_steps = len(os.listdir(folder / "small/train/any")) // _BATCH  # noqa: PTH208
    print("\n".join(table(found, items=num_steps * _BATCH, unit="images")))


def run(folder: Path, *, rounds: int, cores: int) -> list[Measurement]:
    """An epoch of the images in `folder / "small"`; the baseline is the encoders alone."""
    split = prepared(folder, "small")
    num_steps = len(split) // _BATCH
    recipe = _recipe()
    alternatives: dict[str, Callable[[], object]] = {
        "encoders alone, plain batch norm (upper bound)": _encoders_alone(recipe, num_steps),
        "ours": _ours(recipe, split, num_steps),
    }
    if importlib.util.find_spec("lightly") is not None:
        alternatives["lightly"] = _lightly(recipe, folder / "small" / "train", num_steps, cores)
    return compare(alternatives, rounds=rounds)


def _recipe() -> PretrainRun:
    """MoCo-v2 of the embedded experiment with the sizes of this comparison."""
    experiment = load_experiment(Path("config/config.yaml"))
    changed = {"batch_size": _BATCH, "queue_size": _QUEUE, "precision": "bfloat16", "bn_groups": 2}
    experiment = experiment.model_copy(update={"pretrain": experiment.pretrain | changed})
    return pretrain_run(experiment, "moco-v2", experiment.seeds[0])


def _encoders_alone(run: PretrainRun, num_steps: int) -> Callable[[], None]:
    """Query encoder forward and backward, momentum encoder forward."""
    query_encoder = _encoder(run.encoder)
    momentum_encoder = copy.deepcopy(query_encoder).requires_grad_(requires_grad=False)
    images = torch.randn(_BATCH, 3, _SIZE, _SIZE).to(memory_format=torch.channels_last)

    def work() -> None:
        for _ in range(num_steps):
            with autocast(_CPU, "bfloat16"):
                query = query_encoder(images)
                with torch.no_grad():
                    momentum_encoder(images)
            query.float().sum().backward()

    return work


def _encoder(config: Encoder) -> nn.Sequential:
    backbone = encoders.build(config)
    head = projection_head(backbone.num_features, _DIM, "mlp")
    return nn.Sequential(backbone, head).to(memory_format=torch.channels_last)


def _ours(run: PretrainRun, split: StoredSplit, num_steps: int) -> Callable[[], None]:
    recipe = run.recipe
    assert isinstance(recipe, Contrastive)
    objective = ContrastiveObjective(run, recipe, split)
    objective.module.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(objective.module, recipe)
    loading = Loading(_BATCH, _CPU)
    epochs, steps = count(), count()

    def work() -> None:
        for batch in islice(objective.batches(loading, next(epochs), 0), num_steps):
            with autocast(_CPU, "bfloat16"):
                loss, _ = objective.loss(batch, 0, next(steps))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            objective.after_update(last_of_epoch=False)

    return work


def _lightly(run: PretrainRun, images: Path, num_steps: int, workers: int) -> Callable[[], None]:
    """Lightly's MoCo example: its data set, transform, memory bank and momentum update."""
    recipe = run.recipe
    assert isinstance(recipe, Contrastive)
    data = importlib.import_module("lightly.data")
    transforms = importlib.import_module("lightly.transforms")
    losses = importlib.import_module("lightly.loss")
    utils = importlib.import_module("lightly.models.utils")
    dataset = data.LightlyDataset(
        str(images), transform=transforms.MoCoV2Transform(input_size=_SIZE, gaussian_blur=0.0)
    )
    loader: Any = torch.utils.data.DataLoader(
        dataset, _BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    query_encoder = _encoder(run.encoder)
    momentum_encoder = copy.deepcopy(query_encoder)
    utils.deactivate_requires_grad(momentum_encoder)
    criterion = losses.NTXentLoss(temperature=recipe.temperature, memory_bank_size=(_QUEUE, _DIM))
    optimizer = make_optimizer(query_encoder, recipe)

    def step(query_images: Tensor, key_images: Tensor) -> None:
        utils.update_momentum(query_encoder, momentum_encoder, m=recipe.key_momentum)
        with autocast(_CPU, "bfloat16"):
            query = query_encoder(query_images.to(memory_format=torch.channels_last))
            with torch.no_grad():
                shuffled, order = utils.batch_shuffle(key_images.to(memory_format=torch.channels_last))
                key = utils.batch_unshuffle(momentum_encoder(shuffled), order)
        loss = criterion(query.float(), key.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def work() -> None:
        batches: Iterator[Any] = iter(loader)
        for _ in range(num_steps):
            (query_images, key_images), _, _ = next(batches)
            step(query_images, key_images)

    return work


if __name__ == "__main__":
    typer.run(main)
