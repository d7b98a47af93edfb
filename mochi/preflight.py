"""What can be known about an experiment before anything is computed: does it fit its data and this machine,
how much work is it, and how long will it take here?"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mochi.config import (
    EVALUATIONS,
    Contrastive,
    Experiment,
    Run,
    Supervised,
    Training,
    method_seeds,
    resolve,
)
from mochi.data.format import DataError, StoredDataset, open_dataset
from mochi.data.views.loading import steps_per_epoch
from mochi.pretraining.objectives import make_learner, queue_warning
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import autocast

_MEASURED_STEPS = 5
_SMALL_SHARED_MEMORY = 1 << 30
_USUAL_SIZE = 224  # of views, whatever the size of the images


def check(experiment: Experiment, data_root: Path, *, verify: bool = False) -> list[str]:
    """Findings, one line each, starting with `error`, `warning` or `note`.

    Args:
        experiment: already checked in itself, as every experiment that loads.
        data_root: holds the prepared data sets.
        verify: read the prepared files whole and compare their sha256 with the manifest's.
    """
    return [*_machine(), *_data(experiment, data_root, verify)]


def plan(experiment: Experiment, data_root: Path, *, measure: bool) -> list[str]:
    """Runs, steps, disk and, with `measure`, hours from a few timed steps of each method.

    Raises:
        DataError: the data set is not prepared: the number of steps depends on it.
    """
    dataset = open_dataset(data_root / experiment.dataset.name)
    lines, total_hours, num_runs = [], 0.0, 0
    for method in experiment.methods:
        seeds = method_seeds(experiment, method)
        run = resolve(experiment, method, seeds[0])
        num_runs += len(seeds)
        if not isinstance(run.pretrain, Training):
            lines.append(f"{method}: {len(seeds)} runs, nothing to train")
            continue
        steps = run.pretrain.epochs * steps_per_epoch(
            make_learner(run, dataset).num_images, run.pretrain.batch_size
        )
        text = f"{method}: {len(seeds)} runs of {steps} steps"
        if measure:
            seconds = _seconds_per_step(run, dataset)
            hours = len(seeds) * steps * seconds / 3600
            total_hours += hours
            text += f", {seconds:.3f} s a step, {hours:.2f} h"
        lines.append(text)
    gigabytes = shutil.disk_usage(data_root).free / 1e9
    lines.append(f"{num_runs} runs; {gigabytes:.0f} GB of disk are free under {data_root}")
    if measure:
        lines.append(f"pretraining: {total_hours:.2f} h if the runs go one after another on this device")
    return lines


def _machine() -> Iterator[str]:
    device = pick_device()
    yield f"note: computing on {device}, {os.cpu_count()} processor cores"
    shared = Path("/dev/shm")  # noqa: S108 (looked at, not written to)
    if shared.exists() and (size := shutil.disk_usage(shared).total) < _SMALL_SHARED_MEMORY:
        yield (
            f"warning: /dev/shm holds {size / 1e6:.0f} MB; loading workers of large images need more; "
            "run the container with --ipc=host or --shm-size=16g"
        )


def _data(experiment: Experiment, data_root: Path, verify: bool) -> Iterator[str]:
    yield from _detection(experiment)
    folder = data_root / experiment.dataset.name
    try:
        dataset = open_dataset(folder)
    except DataError as error:
        place = getattr(experiment.dataset, "path", None)
        if place is not None and not Path(place).exists():
            yield f"error: dataset.path: {place}: not found, and nothing is prepared in {folder}"
        yield f"note: data not prepared yet ({error})"
        return
    if dataset.manifest["options"] != experiment.dataset.model_dump(mode="json"):
        yield (
            f"warning: {folder}: prepared with other options than the experiment's dataset: "
            f"{dataset.manifest['options']}; Snakemake prepares it again"
        )
    for path in dataset.damaged() if verify else ():
        yield f"error: {path}: missing or damaged: its sha256 is not the manifest's; prepare the data again"
    yield from _sizes(experiment, dataset)
    yield from _labels(experiment, dataset)
    for method in experiment.methods:
        run = resolve(experiment, method, method_seeds(experiment, method)[0])
        if not isinstance(run.pretrain, Training):
            continue
        if isinstance(run.pretrain, Supervised) and not _labelled(dataset, "train"):
            yield f"error: {method}: found 0 labelled images in train; bring some, or remove {method}"
            continue
        num_images = make_learner(run, dataset).num_images
        try:
            steps_per_epoch(num_images, run.pretrain.batch_size)
        except DataError as error:
            yield f"error: {method}: {error}"
        if isinstance(run.pretrain, Contrastive) and (text := queue_warning(run.pretrain, num_images)):
            yield f"warning: {method}: {text}"


def _detection(experiment: Experiment) -> Iterator[str]:
    """Detection sets that are not made here must lie where the experiment says."""
    for name, chosen in experiment.evaluation.detection.items():
        if chosen.data.scenes is None:
            for file in chosen.data.annotation_files():
                if not Path(file).exists():
                    yield f"error: evaluation.detection.{name}: {file}: not found; bring the set there"


def _labels(experiment: Experiment, dataset: StoredDataset) -> Iterator[str]:
    """A probe learns from labelled images of train and is judged on those of val."""
    for task in EVALUATIONS:
        if getattr(experiment.evaluation, task) is not None:
            for split in ("train", "val"):
                if not _labelled(dataset, split):
                    yield (
                        f"error: evaluation.{task}: found 0 labelled images in {split}; "
                        f"bring some, or remove {task} from the experiment"
                    )


def _labelled(dataset: StoredDataset, split: str) -> int:
    entry = dataset.manifest["splits"].get(split, {"count": 0, "unlabelled": 0})
    return int(entry["count"] - entry["unlabelled"])


def _sizes(experiment: Experiment, dataset: StoredDataset) -> Iterator[str]:
    """Views much smaller than the images waste what is in them."""
    if not dataset.manifest["splits"].get("train", {}).get("count"):
        return
    train, size = dataset.split("train"), experiment.augmentation.image_size
    short = int(np.median(np.minimum(train.heights, train.widths)))
    if short >= 2 * size and size < _USUAL_SIZE:
        yield (
            f"warning: augmentation.image_size: found {size}; images of train have a median short side of "
            f"{short} px; `python -m mochi check --data` says what fits"
        )


def _seconds_per_step(run: Run, dataset: StoredDataset) -> float:
    """Median time of a few training steps, data loading included."""
    recipe = run.pretrain
    assert isinstance(recipe, Training)
    device = pick_device()
    learner = make_learner(run, dataset)
    learner.module.to(device).to(memory_format=torch.channels_last)
    # The last epoch: past the warm-up without synthesis.
    batches = learner.batches(
        recipe.epochs - 1, 0, batch_size=recipe.batch_size, seed=run.seed, device=device
    )
    times = []
    for _ in range(_MEASURED_STEPS):
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        with autocast(device, recipe.precision):
            loss, _ = learner.loss(batch, recipe.epochs - 1, 0)
        loss.backward()
        learner.after_update(last_of_epoch=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
