"""Features of a frozen encoder."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mochi.config import ProbeRun
from mochi.data.format import StoredDataset
from mochi.data.views.loading import Images, Loading, centre_crops
from mochi.encoders.resnet import ResNet
from mochi.errors import DataError
from mochi.runtime.precision import autocast, use_bfloat16

_PRECISION = "auto"


class Frozen(NamedTuple):
    """What a task works on."""

    run: ProbeRun
    encoder: ResNet
    """In evaluation mode, without gradients."""
    dataset: StoredDataset
    device: torch.device
    workers: int
    """Processes that load images."""
    work: Path
    """Folder for resume checkpoints."""


class Features(NamedTuple):
    """Features of the labelled images of train and val, each image once and uncropped."""

    train: Tensor  # (M, D) float32
    train_labels: Tensor  # (M,)
    val: Tensor  # (V, D)
    val_labels: Tensor  # (V,)


def extract_splits(frozen: Frozen) -> Features:
    """Features of train and val under the evaluation's transform, on the encoder's device.

    Raises:
        DataError: a split is missing, or has no labelled image.
    """
    run = frozen.run
    parts: list[Tensor] = []
    for name in ("train", "val"):
        split = frozen.dataset.split(name)
        if not len(split.labelled):
            raise DataError(
                f"{frozen.dataset.folder}: found 0 labelled images in {name}; a probe needs labels; "
                "provide some, or remove linear and knn from the experiment"
            )
        loading = Loading(run.batch_size, frozen.device, frozen.workers)
        crops = centre_crops(split, loading, resize=run.resize, image_size=run.image_size)
        parts += extract(frozen.encoder, crops, len(split.labelled))
    return Features(*parts)


@torch.no_grad()
def extract(encoder: ResNet, batches: Iterable[Images], count: int) -> tuple[Tensor, Tensor]:
    """Features (count, D) float32 and labels (count,) of all images of `batches`, on their device."""
    features = labels = torch.empty(0)
    done = 0
    for batch in batches:
        with autocast(batch.images.device, _PRECISION):
            found = encoder(batch.images).float()
        if not done:  # one allocation: at ImageNet's size a list and its concatenation are too much
            features = found.new_empty(count, found.shape[1])
            labels = batch.labels.new_empty(count)
        rows = slice(done, done + len(found))
        features[rows], labels[rows] = found, batch.labels
        done += len(found)
    assert done == count, f"{done} images instead of {count}"
    return features, labels


def precision_on(device: torch.device) -> str:
    """The number format in which `extract` runs an encoder there, for provenance."""
    return "bfloat16" if use_bfloat16(device, _PRECISION) else "float32"
