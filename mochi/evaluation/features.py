"""Features of a frozen encoder."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mochi.config import ProbeRun
from mochi.data.format import StoredDataset, StoredSplit
from mochi.data.views.loading import Images, Loading, centre_crops
from mochi.data.views.stored_crops import Rows
from mochi.encoders.backbone import Backbone
from mochi.errors import DataError
from mochi.evaluation.resume import ResumePoint
from mochi.runtime.precision import autocast, use_bfloat16

_PRECISION = "auto"


class Frozen(NamedTuple):
    """What a task works on."""

    run: ProbeRun
    encoder: Backbone
    """In evaluation mode, without gradients."""
    dataset: StoredDataset
    device: torch.device
    workers: int
    """Processes that load images."""
    resume_point: ResumePoint


def labelled_split(dataset: StoredDataset, name: str) -> StoredSplit:
    """A split that has labels.

    Raises:
        DataError: the split is missing, or has no labelled image.
    """
    split = dataset.split(name)
    if not len(split.labelled):
        raise DataError(
            f"{dataset.folder}: found 0 labelled images in {name}; a probe needs labels; "
            "provide some, or remove linear and knn from the experiment"
        )
    return split


def extract_split(frozen: Frozen, name: str, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """Features under the evaluation's transform and labels of a split's images, on the encoder's device.

    Args:
        frozen: the encoder, the data and the transform.
        name: of the split.
        rows: of the split, all labelled; None: all that are labelled.

    Returns:
        (M, D) float32 features and (M,) labels, in the order of `rows`. Memory: these and one batch.
    """
    run, split = frozen.run, labelled_split(frozen.dataset, name)
    rows = split.labelled if rows is None else rows
    loading = Loading(run.batch_size, frozen.device, frozen.workers)
    crops = centre_crops(split, loading, resize=run.resize, image_size=run.image_size, rows=rows)
    return extract(frozen.encoder, crops, len(rows))


def extract(encoder: Backbone, batches: Iterable[Images], count: int) -> tuple[Tensor, Tensor]:
    """Features (count, D) float32 and labels (count,) of all images of `batches`, on their device."""
    features = labels = torch.empty(0)
    done = 0
    for batch in batches:
        found = features_of(encoder, batch.images)
        if not done:  # one allocation: at ImageNet's size a list and its concatenation are too much
            features = found.new_empty(count, found.shape[1])
            labels = batch.labels.new_empty(count)
        rows = slice(done, done + len(found))
        features[rows], labels[rows] = found, batch.labels
        done += len(found)
    assert done == count, f"{done} images instead of {count}"
    return features, labels


@torch.no_grad()
def features_of(encoder: Backbone, images: Tensor) -> Tensor:
    """(B, 3, S, S) images -> (B, D) float32 features."""
    with autocast(images.device, _PRECISION):
        features: Tensor = encoder(images)
    return features.float()


def precision_on(device: torch.device) -> str:
    """The number format in which `features_of` runs an encoder there, for provenance."""
    return "bfloat16" if use_bfloat16(device, _PRECISION) else "float32"
