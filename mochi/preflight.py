"""Everything that a later stage would refuse, found before anything is computed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from mochi import layout
from mochi.config import (
    Contrastive,
    Dataset,
    Experiment,
    FromFile,
    PretrainRun,
    Supervised,
    Training,
    method_seeds,
    pretrain_run,
    probes,
)
from mochi.config.datasets import Folder
from mochi.data.format import StoredDataset, open_dataset
from mochi.data.ingest import classes
from mochi.data.ingest.sources.folder import collect, current_listing
from mochi.data.views.loading import steps_per_epoch
from mochi.encoders.files import EncoderError, load_encoder
from mochi.errors import DataError, UserError
from mochi.pretraining.objectives import make_objective
from mochi.pretraining.stage import queue_warning
from mochi.provenance.wanted import prepared
from mochi.runtime.distributed import pick_device

_MEASURED_STEPS = 5
_SMALL_SHARED_MEMORY = 1 << 30
_USUAL_SIZE = 224  # of views, whatever the size of the images


class Finding(NamedTuple):
    """One thing to know; an error would stop a later stage."""

    level: Literal["error", "warning", "note"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def check(experiment: Experiment, *, verify: bool = False) -> list[Finding]:
    """Everything that can be said about an experiment whose file is valid.

    Args:
        experiment: what is to be computed.
        verify: read the prepared files whole and compare their sha256 with the manifest's.
    """
    return [
        *_machine(),
        *_encoder_files(experiment),
        *_detection(experiment),
        *_data(experiment, verify),
    ]


def _machine() -> Iterator[Finding]:
    device = pick_device()
    yield Finding("note", f"computing on {device}, {os.cpu_count()} CPU cores")
    shared = Path("/dev/shm")  # noqa: S108 (read, not written)
    if shared.exists() and (size := shutil.disk_usage(shared).total) < _SMALL_SHARED_MEMORY:
        yield Finding(
            "warning",
            f"{shared} has {size / 1e6:.0f} MB; loading workers of large images need more; "
            "run the container with --ipc=host or --shm-size=16g",
        )


def _encoder_files(experiment: Experiment) -> Iterator[Finding]:
    """Encoders that are not trained here must be there and fit."""
    for method in experiment.methods:
        run = pretrain_run(experiment, method, method_seeds(experiment, method)[0])
        if isinstance(run.recipe, FromFile):
            try:
                load_encoder(Path(run.recipe.path), run.encoder, torch.device("cpu"))
            except EncoderError as error:
                yield Finding("error", f"methods.{method}.path: {error}")


def _detection(experiment: Experiment) -> Iterator[Finding]:
    """Detection sets that are not generated: their files, contents and images."""
    for name, chosen in experiment.evaluation.detection.items():
        if chosen.data.scenes is not None:
            continue
        where = f"evaluation.detection.{name}"
        missing = [file for file in chosen.data.annotation_files() if not Path(file).exists()]
        for file in missing:
            yield Finding("error", f"{where}: {file}: not found; put the set there")
        if not missing:
            from mochi.detection import sets  # noqa: PLC0415 (detection is an extra)

            jobs = os.cpu_count() or 1
            errors, warnings = sets.problems(chosen.data, masks=chosen.model.masks, jobs=jobs)
            yield from (Finding("error", f"{where}: {text}") for text in errors)
            yield from (Finding("warning", f"{where}: {text}") for text in warnings)


def _data(experiment: Experiment, verify: bool) -> Iterator[Finding]:
    folder = layout.dataset(experiment.dataset.name)
    try:
        dataset = open_dataset(folder)
    except DataError as error:
        place = getattr(experiment.dataset, "path", None)
        if place is not None and not Path(place).exists():
            yield Finding("error", f"dataset.path: {place}: not found, and nothing is prepared in {folder}")
        else:
            yield from _source(experiment.dataset)
        yield Finding("note", f"data not prepared yet ({error})")
        return
    stale = prepared(experiment.dataset, folder, current_listing(experiment.dataset, folder)).why_stale()
    if stale is not None:
        yield from _source(experiment.dataset)
        yield Finding(
            "warning",
            f"{folder}: not the data set of this experiment ({stale}); the workflow prepares it again, and "
            "what follows here is about the old one",
        )
    for path in dataset.damaged() if verify else ():
        text = f"{path}: missing or corrupt: its sha256 is not the manifest's; prepare the data again"
        yield Finding("error", text)
    counts = {name: entry["classes"] for name, entry in dataset.manifest["splits"].items()}
    yield from (Finding("error", text) for text in classes.faults(counts))
    yield from (Finding("warning", text) for text in classes.oddities(counts))
    yield from _sizes(experiment, dataset)
    yield from _labels(experiment, dataset)
    for method in experiment.methods:
        yield from _recipe(pretrain_run(experiment, method, method_seeds(experiment, method)[0]), dataset)


def _source(dataset: Dataset) -> Iterator[Finding]:
    """What preparing the user's own images would stop at, as far as their names tell."""
    try:
        if isinstance(dataset, Folder):
            collect(dataset, Path())
    except UserError as error:
        yield Finding("error", str(error))


def _recipe(run: PretrainRun, dataset: StoredDataset) -> Iterator[Finding]:
    """Batch, queue and labels of one row."""
    recipe = run.recipe
    if not isinstance(recipe, Training):
        return
    if isinstance(recipe, Supervised) and not _labelled(dataset, "train"):
        text = f"{run.method}: found 0 labelled images in train; provide some, or remove the row"
        yield Finding("error", text)
        return
    num_images = make_objective(run, dataset).num_images
    try:
        steps_per_epoch(num_images, recipe.batch_size)
    except DataError as error:
        yield Finding("error", f"{run.method}: {error}")
    if isinstance(recipe, Contrastive) and (warning := queue_warning(recipe, num_images)):
        yield Finding("warning", f"{run.method}: {warning}")


def _labels(experiment: Experiment, dataset: StoredDataset) -> Iterator[Finding]:
    """A probe learns from labelled images of train and is evaluated on those of val."""
    for task in probes(experiment):
        for split in ("train", "val"):
            if not _labelled(dataset, split):
                yield Finding(
                    "error",
                    f"evaluation.{task}: found 0 labelled images in {split}; "
                    f"provide some, or remove {task} from the experiment",
                )
    size = experiment.augmentation.image_size
    if probes(experiment) and experiment.evaluation.image_size * 2 <= size:
        yield Finding(
            "warning",
            f"evaluation.image_size: found {experiment.evaluation.image_size}; encoders are trained at "
            f"augmentation.image_size = {size}; evaluate at the size of the training",
        )


def _labelled(dataset: StoredDataset, split: str) -> int:
    entry = dataset.manifest["splits"].get(split, {"count": 0, "unlabelled": 0})
    return int(entry["count"] - entry["unlabelled"])


def _sizes(experiment: Experiment, dataset: StoredDataset) -> Iterator[Finding]:
    """Views much smaller than the images waste what is in them."""
    if not dataset.manifest["splits"].get("train", {}).get("count"):
        return
    train, size = dataset.split("train"), experiment.augmentation.image_size
    if said := train.oversized():
        yield Finding("warning", said)
    short = int(np.median(np.minimum(train.heights, train.widths)))
    if short >= 2 * size and size < _USUAL_SIZE:
        yield Finding(
            "warning",
            f"augmentation.image_size: found {size}; images of train have a median short side of "
            f"{short} px; `mochi inspect` recommends a size",
        )
