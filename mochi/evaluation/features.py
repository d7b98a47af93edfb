"""Features of a frozen encoder, and the other inputs of a task."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mochi.config import ProbeRun
from mochi.data.format import StoredDataset, StoredSplit
from mochi.data.views.loading import Images, Loading, centre_crops, random_crops
from mochi.data.views.stored_crops import Rows
from mochi.encoders.backbone import Backbone
from mochi.errors import DataError
from mochi.evaluation.feature_files import FeatureFiles
from mochi.evaluation.resume import ResumePoint
from mochi.runtime import distributed
from mochi.runtime.precision import autocast, use_bfloat16
from mochi.runtime.progress import Progress
from mochi.runtime.seeding import generator

logger = logging.getLogger(__name__)

_PRECISION = "auto"


class Features(NamedTuple):
    """Features of images, in the order of their rows in the split. The caller may change them in place."""

    values: Tensor
    """(M, D) float32, on the device or on the host (`features_on`)."""
    labels: Tensor
    """(M,) int64, on the same device as `values`."""


@dataclass(frozen=True)
class Frozen:
    """The input of a task: an encoder in evaluation mode, without gradients, and a labelled data set.

    Several ranks share the encoding of images. Every rank gets all features, so that a task needs no code
    for them.
    """

    run: ProbeRun
    encoder: Backbone
    dataset: StoredDataset
    device: torch.device
    """Where to compute."""
    workers: int
    """Processes of this rank that load images."""
    resume_point: ResumePoint
    files: FeatureFiles | None = None
    """Features shared with other evaluations of the encoder; None: not stored."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, including those without images."""
        return len(self.dataset.classes)

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        """A random number generator that depends only on its purpose and key."""
        return generator(purpose, *key)

    def split(self, name: str) -> StoredSplit:
        """A split with labels.

        Raises:
            DataError: the split is missing, or has no labelled image.
        """
        split = self.dataset.split(name)
        if not len(split.labelled):
            raise DataError(
                f"{self.dataset.folder}: found 0 labelled images in {name}; a probe needs labels; "
                f"provide some, or remove evaluation.{self.run.name} from the experiment"
            )
        return split

    def features(self, name: str) -> Features:
        """Features of all labelled images of a split: short side `resize`, centre crop, no random crops.

        Computed once for all evaluations of the experiment that need them. Memory: these and one batch.

        Raises:
            DataError: the split is missing, or has no labelled image.
        """
        split = self.split(name)
        if self.files is None:
            return self.features_of(split, split.labelled)
        with self.files.of_split(name) as file:
            shape = len(split.labelled), self.encoder.num_features
            stored = file.read(shape)
            # Either every rank reads or every rank encodes its share.
            if distributed.mean_over_ranks(torch.tensor(float(stored is None), device=self.device)) == 0:
                assert stored is not None
                storage = self._storage_device(*shape)
                return Features(stored.to(storage), self._labels(split, split.labelled).to(storage))
            features = self.features_of(split, split.labelled)
            file.write(features.values)
            return features

    def features_of(self, split: StoredSplit, rows: Rows) -> Features:
        """Like `features`, for some rows of a split, all labelled; computed for this call only."""
        run, world = self.run, distributed.world_size()
        batch_size = run.batch_size * world  # so each rank's batch equals a batch of a single process
        loading = Loading(batch_size, self.device, self.workers, distributed.rank(), world)
        crops = centre_crops(split, loading, resize=run.resize, image_size=run.image_size, rows=rows)
        storage = self._storage_device(len(rows), self.encoder.num_features)
        # One allocation: at ImageNet's size a list and its concatenation need too much memory.
        values = torch.empty(len(rows), self.encoder.num_features, device=storage)
        label = f"{run.method} seed {run.seed}, features of {split.name}"
        done = 0
        with Progress(label, -(-len(rows) // batch_size)) as progress:
            for encoded, _ in self._encoded(crops, len(rows), batch_size):
                values[done : done + len(encoded)] = encoded.to(storage)
                done += len(encoded)
                progress.advance()
        return Features(values, self._labels(split, rows).to(storage))

    def random_crops(
        self, split: StoredSplit, *, batch_size: int, min_scale: float, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of random-resized crops and flips of the labelled images, with the short last batch.

        Args:
            split: the images.
            batch_size: over all ranks.
            min_scale: smallest fraction of an image's area that a crop may cover.
            epoch: determines order and crops, together with the run's seed.

        Yields:
            (B, D) features on the device and (B,) rows of the split on the CPU, of the whole batch.
        """
        rank, world = distributed.rank(), distributed.world_size()
        loading = Loading(batch_size, self.device, self.workers, rank, world)
        crops = random_crops(
            split,
            loading,
            image_size=self.run.image_size,
            min_scale=min_scale,
            seed=self.run.seed,
            epoch=epoch,
        )
        return self._encoded(crops, len(split.labelled), batch_size)

    def _encoded(
        self, batches: Iterator[Images], total: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, D) features on the device and (B,) rows on the CPU of every batch over all ranks."""
        for first in range(0, total, batch_size):
            count = min(batch_size, total - first)
            if _share(count, distributed.rank()):
                batch = next(batches)
                own, rows = encode(self.encoder, batch.images), batch.indices
            else:
                own = torch.empty(0, self.encoder.num_features, device=self.device)
                rows = torch.empty(0, dtype=torch.int64)
            yield _gather_uneven(own, count, self.device), _gather_uneven(rows, count, self.device)

    def _labels(self, split: StoredSplit, rows: Rows) -> Tensor:
        return torch.from_numpy(split.labels[rows])

    def _storage_device(self, count: int, width: int) -> torch.device:
        """The device that stores `count` features of `width` numbers each (`features_on`)."""
        where = self.run.features_on
        if where == "auto" and self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            where = "device" if 4 * count * width <= free // 2 else "host"
        return torch.device("cpu") if where == "host" else self.device


def _share(count: int, rank: int) -> int:
    """Rows of a batch of `count` that a rank loads, as numpy's `array_split` gives them."""
    world = distributed.world_size()
    return count // world + (rank < count % world)


def _gather_uneven(own: Tensor, count: int, device: torch.device) -> Tensor:
    """Gather the `_share` of every rank over `device`: (count, ...), on the device of `own`."""
    if distributed.world_size() == 1:
        return own
    most = _share(count, 0)
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
    parts = distributed.gather(padded.to(device)).split(most)
    return torch.cat([part[: _share(count, rank)] for rank, part in enumerate(parts)]).to(own.device)


@torch.no_grad()
def encode(encoder: Backbone, images: Tensor) -> Tensor:
    """(B, 3, S, S) images -> (B, D) float32 features."""
    with autocast(images.device, _PRECISION):
        features: Tensor = encoder(images)
    return features.float()


def precision_on(device: torch.device) -> str:
    """The number format in which `encode` runs an encoder there, for provenance."""
    return "bfloat16" if use_bfloat16(device, _PRECISION) else "float32"
